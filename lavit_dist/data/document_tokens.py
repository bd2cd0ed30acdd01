"""The token ids of documents, written straight from a shard's columns to where a row wants them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from lavit_dist.data.id_shard import IMAGE, TEXT, IdShard
from lavit_dist.models.vocabulary import Vocabulary


def write_tokens(
    out: NDArray[np.int64],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    shard: IdShard,
    documents: NDArray[np.int64],
    *,
    text_leads: NDArray[np.bool_],
    drops_caption: NDArray[np.bool_],
    vocabulary: Vocabulary,
    eos_id: int,
) -> None:
    """Writes document `documents[n]` of `shard`, `lengths[n]` tokens, to `out` from `starts[n]` on.

    Text goes as it is, an image as [IMG] codes [/IMG], EOS comes at the end. A pair (one image, one text) is ordered [text, image] where
    `text_leads`, and is its image alone where `drops_caption`; other documents have their segments in their order. Raises
    `ValueError` for a document of another length than the one given.
    """
    wrong = _write(
        out,
        starts,
        lengths,
        shard.segment_kinds,
        shard.segment_starts,
        shard.segment_lengths,
        shard.ids,
        shard.id_starts,
        documents,
        text_leads,
        drops_caption,
        vocabulary.code_offset,
        vocabulary.image_start,
        vocabulary.image_end,
        eos_id,
    )
    if wrong >= 0:
        raise ValueError(
            f"document {documents[wrong]} of a shard does not have the {lengths[wrong]} tokens that it was packed with"
        )


@njit(cache=True, nogil=True)
def _write(
    out: Any,
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
    """Index of the first document whose length is another than said; -1 if all are written."""
    for index in range(documents.size):
        first, last = segment_starts[documents[index]], segment_starts[documents[index] + 1]
        is_pair = last - first == 2 and kinds[first] != kinds[first + 1]
        reverses = is_pair and not drops_caption[index] and (kinds[first] == TEXT) != text_leads[index]
        length = 1
        for segment in range(first, last):
            if not (is_pair and drops_caption[index] and kinds[segment] == TEXT):
                length += segment_lengths[segment] + (2 if kinds[segment] == IMAGE else 0)
        if length != lengths[index] or starts[index] + length > out.size:
            return index
        at = starts[index]
        for turn in range(last - first):
            segment = last - 1 - turn if reverses else first + turn
            is_image = kinds[segment] == IMAGE
            if is_pair and drops_caption[index] and not is_image:
                continue
            start = id_starts[documents[index]] + segment_lengths[first:segment].sum()
            if is_image:
                out[at] = image_start
                at += 1
            offset = code_offset if is_image else 0
            for place in range(start, start + segment_lengths[segment]):
                out[at] = ids[place] + offset
                at += 1
            if is_image:
                out[at] = image_end
                at += 1
        out[at] = eos_id
    return -1
