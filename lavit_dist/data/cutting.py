"""Where documents are cut, and which of their tokens have a loss: those behind a prefix that the model is given. One compiled pass."""

from __future__ import annotations

from typing import Any

import numpy as np

from lavit_dist.config.documents import Supervise
from lavit_dist.data.compiled import compiled
from lavit_dist.data.id_shard import IMAGE, TEXT

ALL, SECOND, GENERATED = range(3)
SUPERVISE: dict[Supervise, int] = {"all": ALL, "second": SECOND, "generated": GENERATED}
"""The policies as compiled code knows them."""


@compiled
def cut(
    kinds: Any,
    segment_lengths: Any,
    segment_starts: Any,
    documents: Any,
    text_leads: Any,
    drops_caption: Any,
    seq_len: int,
    supervise: int,
    out: Any,
) -> int:
    """Writes the columns of each span to `out` [column, span] as far as it has room, and returns how many there are."""
    most = 0
    for document in documents:
        most = max(most, segment_starts[document + 1] - segment_starts[document])
    arranged_kinds, arranged_lengths = np.empty(most, np.int64), np.empty(most, np.int64)
    count = 0
    for index in range(documents.size):
        first, last = segment_starts[documents[index]], segment_starts[documents[index] + 1]
        is_pair = last - first == 2 and kinds[first] != kinds[first + 1]
        reverses = is_pair and (kinds[first] == TEXT) != text_leads[index]
        number = 0
        for turn in range(last - first):
            segment = last - 1 - turn if reverses else first + turn
            is_dropped = is_pair and drops_caption[index]
            if kinds[segment] == TEXT and (is_dropped or segment_lengths[segment] == 0):  # a text without ids is no segment
                continue
            arranged_kinds[number], arranged_lengths[number] = kinds[segment], segment_lengths[segment]
            number += 1
        count = _cut_document(arranged_kinds[:number], arranged_lengths[:number], index, seq_len, supervise, out, count)
    return count


@compiled
def _cut_document(kinds: Any, lengths: Any, index: int, seq_len: int, supervise: int, out: Any, count: int) -> int:
    """The spans of one document with these segments, in order; they fill rows from the left. Returns `count` plus their number."""
    num_given = _given_segments(kinds, supervise)
    given, given_of_image, total = 0, 0, 1
    for segment in range(kinds.size):
        tokens, of_image = _segment_tokens(kinds[segment], lengths[segment])
        total += tokens
        if segment < num_given:
            given += tokens
            given_of_image += of_image
    start, end, of_image_before_start, of_image_before_end = 0, 0, 0, 0
    for segment in range(kinds.size):
        tokens, of_image = _segment_tokens(kinds[segment], lengths[segment])
        is_last = segment == kinds.size - 1
        end += tokens + is_last  # EOS goes with the last segment
        while end > start + seq_len:
            border = end - tokens - is_last
            if kinds[segment] == TEXT:
                border = start + seq_len
                if border == total - 1:
                    border -= 1  # EOS alone would be a piece with nothing to predict
            _write(out, count, index, start, border, given, given_of_image, of_image_before_start, of_image_before_end)
            count += 1
            start, of_image_before_start = border, of_image_before_end
        of_image_before_end += of_image
    _write(out, count, index, start, total, given, given_of_image, of_image_before_start, of_image_before_end)
    return count + 1


@compiled
def _write(
    out: Any, count: int, index: int, start: int, end: int, given: int, given_of_image: int, before_start: int, before_end: int
) -> None:
    """Span `count`, tokens `start` to `end`; `before_*` are the tokens of images that come before those places in the document."""
    if count >= out.shape[1]:
        return
    without_loss = min(end, max(start + 1, given))
    # A span begins with text or [IMG], which are not of an image: its first token changes no number of those.
    before_loss = given_of_image if given > start else before_start
    out[0, count] = index
    out[1, count] = start
    out[2, count] = end - start
    out[3, count] = without_loss - start
    out[4, count] = max(0, before_end - before_loss)


@compiled
def _given_segments(kinds: Any, supervise: int) -> int:
    """How many of a document's leading segments, of `kinds`, have no loss."""
    if supervise == SECOND and kinds.size > 1:
        return 1
    if supervise == GENERATED:
        for segment in range(kinds.size):
            if kinds[segment] == TEXT:
                return segment  # images alone come before the first text
    return 0


@compiled
def _segment_tokens(kind: int, length: int) -> tuple[int, int]:
    """The tokens of a segment of `length` ids, and how many of them are of an image as `MicroBatch.modality` has it: codes and [/IMG]."""
    return (length + 2, length + 1) if kind == IMAGE else (length, 0)
