"""The token ids of documents, written straight from a shard's columns to where a row wants them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lavit_dist.data.compiled import compiled
from lavit_dist.data.id_shard import IMAGE, TEXT, IdShard
from lavit_dist.data.spans import Spans
from lavit_dist.models.vocabulary import Vocabulary


def write_tokens(
    out: NDArray[np.int64], places: NDArray[np.int64], shard: IdShard, spans: Spans, *, vocabulary: Vocabulary, eos_id: int
) -> None:
    """Writes each of `spans`, of documents of `shard`, to `out` from its place on.

    Text goes as it is, an image as [IMG] codes [/IMG], EOS comes at the end. A pair (one image, one text) is ordered [text, image] where
    `text_leads`, and is its image alone where `drops_caption`; other documents have their segments in their order. Raises
    `ValueError` for a span that its document or `out` is too short for.
    """
    wrong = _write(
        out,
        places,
        spans.starts,
        spans.lengths,
        shard.segment_kinds,
        shard.segment_starts,
        shard.segment_lengths,
        shard.ids,
        shard.id_starts,
        spans.documents,
        spans.text_leads,
        spans.drops_caption,
        vocabulary.code_offset,
        vocabulary.image_start,
        vocabulary.image_end,
        eos_id,
    )
    if wrong >= 0:
        raise ValueError(
            f"document {spans.documents[wrong]} of a shard does not have the tokens {spans.starts[wrong]} to"
            f" {spans.starts[wrong] + spans.lengths[wrong]} that it was packed with"
        )


@compiled
def _write(
    out: Any,
    places: Any,
    starts: Any,
    lengths: Any,
    kinds: Any,
    segment_starts: Any,
    segment_lengths: Any,
    ids: Any,
    id_starts: Any,
    documents: Any,
    text_leads: Any,
    drops_caption: Any,
    code_offset: int,
    image_start: int,
    image_end: int,
    eos_id: int,
) -> int:
    """Index of the first span that can't be written; -1 if all are."""
    for index in range(documents.size):
        start, end, place = starts[index], starts[index] + lengths[index], places[index]
        if start < 0 or place < 0 or place + lengths[index] > out.size:
            return index
        first, last = segment_starts[documents[index]], segment_starts[documents[index] + 1]
        is_pair = last - first == 2 and kinds[first] != kinds[first + 1]
        drops = is_pair and drops_caption[index]
        reverses = is_pair and not drops and (kinds[first] == TEXT) != text_leads[index]
        at = 0  # of the document's tokens
        for turn in range(last - first):
            segment = last - 1 - turn if reverses else first + turn
            is_image = kinds[segment] == IMAGE
            if drops and not is_image:
                continue
            before = id_starts[documents[index]] + segment_lengths[first:segment].sum()
            num_ids: int = segment_lengths[segment]
            if is_image:
                if start <= at < end:
                    out[place + at - start] = image_start
                at += 1
            offset = code_offset if is_image else 0
            for number in range(max(0, start - at), min(num_ids, end - at)):
                out[place + at + number - start] = ids[before + number] + offset
            at += num_ids
            if is_image:
                if start <= at < end:
                    out[place + at - start] = image_end
                at += 1
        if start <= at < end:
            out[place + at - start] = eos_id
        if end > at + 1:
            return index
    return -1
