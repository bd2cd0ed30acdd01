"""What an epoch makes of the documents of a shard: spans of tokens, each of which goes into a row as a document of its own.

A span is a whole document, or a piece of one that is longer than a row. Everything here is known from columns: no ids are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lavit_dist.config.documents import DocumentsConfig, TooLong
from lavit_dist.data.captions import caption_groups, one_of_each
from lavit_dist.data.cutting import SUPERVISE, cut
from lavit_dist.data.documents import caption_dropped, text_first
from lavit_dist.data.id_shard import IMAGE, IdShardHead

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

    def numbered_from(self, first: int) -> Spans:
        """Their documents numbered so that `first` is 0."""
        return dataclasses.replace(self, documents=self.documents - first)

    def shuffled_by(self, places: NDArray[np.integer]) -> NDArray[np.int64]:
        """The order of the spans if document n comes at `places[n]`; those of one document stand together, and stay in their order."""
        begins = np.flatnonzero(np.diff(self.documents, prepend=-1))
        counts = np.diff(begins, append=len(self))
        at = np.full(len(places), -1, np.int64)
        at[places[self.documents[begins]]] = np.arange(len(begins))
        documents = at[at >= 0]  # a sort would take most of the time of a plan
        counts = counts[documents]
        return np.repeat(begins[documents] - np.cumsum(counts) + counts, counts) + np.arange(len(self))

    @classmethod
    def joined(cls, parts: Sequence[Spans], first_documents: Sequence[int]) -> Spans:
        """Those of several shards, whose documents are numbered from `first_documents`."""
        moved = [
            dataclasses.replace(part, documents=part.documents + first) for part, first in zip(parts, first_documents, strict=True)
        ]
        return cls(*(np.concatenate([getattr(part, field.name) for part in moved]) for field in dataclasses.fields(cls)))


def usable(shard: IdShardHead, full_lengths: NDArray[np.int64], seq_len: int, too_long: TooLong) -> NDArray[np.bool_]:
    """Which documents of a shard, of `full_lengths` tokens with their caption, can be in an epoch: whole, or in pieces."""
    fits = full_lengths <= seq_len
    if too_long != "split" or seq_len < SHORTEST_ROW:
        return fits
    owner = np.repeat(np.arange(len(shard)), np.diff(shard.segment_starts))
    too_large = (shard.segment_kinds == IMAGE) & (shard.segment_lengths > seq_len - IMAGE_EXTRAS)
    return fits | (np.bincount(owner, weights=too_large, minlength=len(shard)) == 0)


def epoch_spans(
    shard: IdShardHead,
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
    if (count := cut(*arguments, out)) > len(documents):  # some are cut
        out = np.empty((5, count), np.int64)
        cut(*arguments, out)
    owner, starts, lengths, given, image_labels = out
    return Spans(documents[owner], leads[owner], drops[owner], starts, lengths, given, image_labels)
