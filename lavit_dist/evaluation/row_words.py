"""Packed rows in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from lavit_dist.data.image_tokens import IMAGE_END, IMAGE_START
from lavit_dist.data.seen_rows import Loss, SeenDocument, SeenRow, Slot, slot_kinds
from lavit_dist.models.vocabulary import Vocabulary

EOS = "[EOS]"


def shortened(tokens: NDArray[np.int64], vocabulary: Vocabulary, eos_id: int, decode: Callable[[Sequence[int]], str]) -> str:
    """The text of a document's tokens, with the number of codes in place of an image's: `[IMG] 87 codes [/IMG] a cat [EOS]`."""
    kinds = slot_kinds(tokens, np.zeros(tokens.shape, np.int32), vocabulary, eos_id)
    words = []
    for kind, pairs in groupby(zip(kinds.tolist(), tokens.tolist(), strict=True), key=lambda pair: pair[0]):
        run = [token for _, token in pairs]
        if kind == Slot.TEXT:
            words.append(decode(run).strip())
        elif kind == Slot.CODE:
            words.append("1 code" if len(run) == 1 else f"{len(run)} codes")
        elif kind == Slot.EOS:
            words += [EOS] * len(run)
        else:
            words += [IMAGE_START if token == vocabulary.image_start else IMAGE_END for token in run]
    return " ".join(word for word in words if word)


def describe_row(row: SeenRow) -> str:
    """Where a row comes in the run, how full it is, and how much of it is learned."""
    size = len(row.slots)
    documents = f"{len(row.documents)} document{'s' * (len(row.documents) != 1)}"
    text, image = (int((row.losses == kind).sum()) for kind in (Loss.TEXT, Loss.IMAGE))
    place = f" (its row {row.source_row})" if row.source_row != row.row else ""
    return (
        f"Row {row.row}: step {row.step}, epoch {row.epoch} of {row.source}{place}; {documents}, {size - row.num_padding:,} of {size:,} slots,"
        f" padding {row.num_padding / size:.1%}; with a loss: {text:,} of text, {image:,} of images"
    )


def describe_source(document: SeenDocument) -> str:
    """Where a document's ids lie."""
    return f"{document.shard}, document {document.index}"


def describe_document(document: SeenDocument) -> str:
    """The order of a document and how many tokens it has: `image then text; 43 tokens, 42 with a loss`."""
    order = " then ".join(document.order) or "nothing"
    dropped = ", caption dropped" if document.drops_caption else ""
    piece = f", from its token {document.first_token} on" if document.first_token else ""
    return f"{order}{dropped}{piece}; {len(document.tokens)} tokens, {document.num_supervised} with a loss"
