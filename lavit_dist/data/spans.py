"""What an epoch makes of the documents of a shard: spans of tokens, each of which goes into a row as a document of its own.

A span is a whole document, or a piece of one that is longer than a row. Everything here is known from columns: no ids are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from lavit_dist.config.documents import DocumentsConfig, TooLong
from lavit_dist.data.captions import caption_groups, one_of_each
from lavit_dist.data.documents import caption_dropped, text_first
from lavit_dist.data.id_shard import IMAGE, TEXT, IdShard
from lavit_dist.data.supervision import SUPERVISE, given_segments, segment_tokens

IMAGE_EXTRAS = 3
"""[IMG] and [/IMG] around an image's codes, and the EOS that may have to follow them."""


SHORTEST_ROW = 2
"""Rows of which a piece can have a label."""


@dataclass(frozen=True)
class Spans:
    """Columns of equal length; a span is tokens `starts` to `starts + lengths` of its document."""

    documents: NDArray[np.int64]
    """Numbers of documents: within the shard, or the set."""
    text_leads: NDArray[np.bool_]
    """Whether the document, if a pair, is ordered [text, image]."""
    drops_caption: NDArray[np.bool_]
    """Whether it is without its caption, if a pair."""
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    given: NDArray[np.int64]
    """The first tokens of the span that have no loss: at least one."""
    image_labels: NDArray[np.int64]
    """Tokens with a loss that are codes or [/IMG]."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Tokens with a loss of each span, [span, 2]: of text, of images."""
        return np.stack([self.lengths - self.given - self.image_labels, self.image_labels], axis=1)

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, spans: NDArray[np.int64] | slice) -> Spans:
        return Spans(*(getattr(self, field.name)[spans] for field in dataclasses.fields(self)))

    def in_order(self, documents: NDArray[np.int64]) -> Spans:
        """Sorted as `documents` has theirs, each once; those of one document stay in their order."""
        by_number = np.argsort(documents)
        places = by_number[np.searchsorted(documents, self.documents, sorter=by_number)]
        return self[np.argsort(places, kind="stable")]

    @classmethod
    def joined(cls, parts: Sequence[Spans], first_documents: Sequence[int]) -> Spans:
        """Those of several shards, whose documents are numbered from `first_documents`."""
        moved = [
            dataclasses.replace(part, documents=part.documents + first) for part, first in zip(parts, first_documents, strict=True)
        ]
        return cls(*(np.concatenate([getattr(part, field.name) for part in moved]) for field in dataclasses.fields(cls)))


def usable(shard: IdShard, full_lengths: NDArray[np.int64], seq_len: int, too_long: TooLong) -> NDArray[np.bool_]:
    """Which documents of a shard, of `full_lengths` tokens with their caption, can be in an epoch: whole, or in pieces."""
    fits = full_lengths <= seq_len
    if too_long != "split" or seq_len < SHORTEST_ROW:
        return fits
    owner = np.repeat(np.arange(len(shard)), np.diff(shard.segment_starts))
    too_large = (shard.segment_kinds == IMAGE) & (shard.segment_lengths > seq_len - IMAGE_EXTRAS)
    return fits | (np.bincount(owner, weights=too_large, minlength=len(shard)) == 0)


def epoch_spans(
    shard: IdShard,
    is_usable: NDArray[np.bool_],
    policy: DocumentsConfig,
    *,
    seq_len: int,
    seed: int,
    epoch: int,
    caption_dropout: float,
) -> Spans:
    """The spans of one shard in one epoch, in the order of its documents. `is_usable` is what `usable` says of them."""
    hashes = shard.document_hash
    chosen = is_usable
    if policy.captions == "one":
        chosen = one_of_each(caption_groups(shard), hashes, is_usable, seed, epoch)
    documents = np.flatnonzero(chosen)
    leads = text_first(hashes[documents], seed, epoch)
    drops = caption_dropped(hashes[documents], seed, epoch, caption_dropout)
    columns = shard.segment_kinds, shard.segment_lengths, shard.segment_starts
    arguments = *columns, documents, leads, drops, seq_len, SUPERVISE[policy.supervise]
    out = np.empty((5, len(documents)), np.int64)
    if (count := _cut(*arguments, out)) > len(documents):  # some are cut
        out = np.empty((5, count), np.int64)
        _cut(*arguments, out)
    owner, starts, lengths, given, image_labels = out
    return Spans(documents[owner], leads[owner], drops[owner], starts, lengths, given, image_labels)


@njit(cache=True, nogil=True)
def _cut(
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


@njit(cache=True, nogil=True)
def _cut_document(kinds: Any, lengths: Any, index: int, seq_len: int, supervise: int, out: Any, count: int) -> int:
    """The spans of one document with these segments, in order; they fill rows from the left. Returns `count` plus their number."""
    num_given = given_segments(kinds, supervise)
    given, given_of_image, total = 0, 0, 1
    for segment in range(kinds.size):
        tokens, of_image = segment_tokens(kinds[segment], lengths[segment])
        total += tokens
        if segment < num_given:
            given += tokens
            given_of_image += of_image
    start, end, of_image_before_start, of_image_before_end = 0, 0, 0, 0
    for segment in range(kinds.size):
        tokens, of_image = segment_tokens(kinds[segment], lengths[segment])
        is_last = segment == kinds.size - 1
        end += tokens + is_last  # EOS goes with the last segment
        while end > start + seq_len:
            cut = end - tokens - is_last
            if kinds[segment] == TEXT:
                cut = start + seq_len
                if cut == total - 1:
                    cut -= 1  # EOS alone would be a piece with nothing to predict
            _write(out, count, index, start, cut, given, given_of_image, of_image_before_start, of_image_before_end)
            count += 1
            start, of_image_before_start = cut, of_image_before_end
        of_image_before_end += of_image
    _write(out, count, index, start, total, given, given_of_image, of_image_before_start, of_image_before_end)
    return count + 1


@njit(cache=True, nogil=True)
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
