"""Proof that an epoch has what it should: its rows are walked as training reads them, and every document is counted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lavit_dist.data.captions import caption_groups
from lavit_dist.data.documents import full_lengths
from lavit_dist.data.id_shard import IMAGE, TEXT, IdShardHead
from lavit_dist.data.micro_batch import PADDING_DOCUMENT, lay_out
from lavit_dist.data.rows import RowDataset
from lavit_dist.data.seen_rows import locate_document
from lavit_dist.data.spans import Spans, usable

NAMED = 10
"""Offenders that are named."""
CACHED_SHARDS = 256


@dataclass
class EpochAudit:
    """What an epoch was found to hold."""

    epoch: int
    rows: int = 0
    documents: int = 0
    """Different documents in it."""
    cut: int = 0
    """Those of them that are in pieces."""
    slots: int = 0
    padding: int = 0
    text_labels: int = 0
    """Tokens with a loss: of text, [IMG] and EOS."""
    image_labels: int = 0
    """Of codes and [/IMG]."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Documents that are not in it, by reason."""
    num_offences: int = 0
    offences: list[str] = field(default_factory=list)
    """The first of them, each a sentence."""

    @property
    def ok(self) -> bool:
        return self.num_offences == 0

    def offend(self, sentence: str) -> None:
        """Counts what must not be."""
        self.num_offences += 1
        if len(self.offences) < NAMED:
            self.offences.append(sentence)


def audit_epoch(dataset: RowDataset, epoch: int, track: Callable[[range], Iterable[int]] = lambda rows: rows) -> EpochAudit:
    """Walks the rows of an epoch and counts; `track` is told of the rows and passes them on, to show progress.

    Takes 4 bytes of memory per document of the set, and reads every token.
    """
    walk = _Walk(dataset, EpochAudit(epoch))
    for row in track(range(dataset.rows_before_epoch(epoch), dataset.rows_before_epoch(epoch + 1))):
        walk.add(row)
    walk.finish()
    return walk.audit


class _Walk:
    def __init__(self, dataset: RowDataset, audit: EpochAudit) -> None:
        self.dataset, self.audit = dataset, audit
        self.times = np.zeros(int(dataset.shard_starts[-1]), np.uint32)
        """How often each document came."""
        self.pieces: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        """First and last token of the pieces of documents that are cut."""
        self.expected: dict[int, int] = {}
        """Tokens of those documents."""
        self._lengths = lru_cache(maxsize=CACHED_SHARDS)(self._lengths_of)

    def add(self, row: int) -> None:
        """Counts one row."""
        rows, audit = self.dataset, self.audit
        spans = rows.row_spans(row)
        audit.rows += 1
        audit.slots += rows.seq_len
        epoch = rows.locate(row)[0]
        if epoch != audit.epoch:
            audit.offend(f"Row {row} is of epoch {epoch}.")
        self._count(row, spans)
        if spans.lengths.sum() > rows.seq_len:
            audit.offend(f"Row {row} holds {spans.lengths.sum()} tokens, over seq_len {rows.seq_len}.")
            return
        try:
            tokens = rows.row_tokens(row)
        except ValueError as error:
            audit.offend(f"Row {row} can't be read: {error}.")
            return
        batch = lay_out(
            [tokens],
            vocabulary=rows.vocabulary,
            eos_id=rows.eos_id,
            seq_len=rows.seq_len,
            weight=1.0,
            modality_weights=rows.modality_weights,
            given=[spans.given.tolist()],
        )
        supervised, of_image = batch.loss_weight > 0, batch.modality > 0
        text, image = int((supervised & ~of_image).sum()), int((supervised & of_image).sum())
        audit.padding += int((batch.document_ids == PADDING_DOCUMENT).sum())
        audit.text_labels += text
        audit.image_labels += image
        if (text, image) != rows.labels(row):
            audit.offend(
                f"Row {row} has a loss on {text} tokens of text and {image} of images, but {rows.labels(row)} count for it."
            )

    def finish(self) -> None:
        """Compares what came with what should have."""
        for document, pieces in sorted(self.pieces.items()):
            self._check_pieces(document, sorted(pieces))
        self.audit.documents = int((self.times > 0).sum())
        for shard in range(len(self.dataset.shards)):
            self._check_shard(shard)

    def _count(self, row: int, spans: Spans) -> None:
        documents = spans.documents.tolist()
        for document, drops, start, length in zip(
            documents, spans.drops_caption.tolist(), spans.starts.tolist(), spans.lengths.tolist(), strict=True
        ):
            shard, index = locate_document(self.dataset, document)
            expected = int(self._lengths(shard)[int(drops)][index])
            if (start, length) == (0, expected):
                self.times[document] += 1
            elif self.dataset.policy.too_long == "split":
                self.pieces[document].append((start, start + length))
                self.expected[document] = expected
            else:
                self.times[document] += 1
                self.audit.offend(
                    f"Row {row} has tokens {start} to {start + length} of {self._name(document)}, which has {expected}."
                )

    def _check_pieces(self, document: int, pieces: list[tuple[int, int]]) -> None:
        self.times[document] += 1
        self.audit.cut += 1
        borders = [0, *(end for _, end in pieces)]
        if [start for start, _ in pieces] != borders[:-1] or borders[-1] != self.expected[document]:
            self.audit.offend(
                f"The pieces of {self._name(document)}, which has {self.expected[document]} tokens, are"
                f" {', '.join(f'{start} to {end}' for start, end in pieces)}."
            )

    def _check_shard(self, number: int) -> None:
        dataset, policy = self.dataset, self.dataset.policy
        shard = dataset.shards.head(number)
        first = int(dataset.shard_starts[number])
        times = self.times[first : first + len(shard)].astype(np.int64)
        can_be = usable(shard, full_lengths(shard), dataset.seq_len, policy.too_long)
        for index in np.flatnonzero(~can_be & (times > 0)).tolist():
            self.audit.offend(f"{self._name(first + index)} is in the epoch, but does not fit a row.")
        too_long = "image does not fit a row" if policy.too_long == "split" else f"longer than seq_len {dataset.seq_len}"
        self._leave_out(too_long, int((~can_be).sum()))
        expected = np.flatnonzero(can_be)
        came = times[expected]
        if policy.captions == "one":
            _, firsts, groups = np.unique(caption_groups(shard)[expected], return_index=True, return_inverse=True)
            self._leave_out("another caption of its image has its turn", len(expected) - len(firsts))
            expected, came = expected[firsts], np.bincount(groups, weights=came, minlength=len(firsts)).astype(np.int64)
        of = ", or another caption of its image," if policy.captions == "one" else ""
        for wrong in np.flatnonzero(came != 1).tolist():
            how = f"comes {came[wrong]} times" if came[wrong] else "is missing"
            self.audit.offend(f"{self._name(first + int(expected[wrong]))}{of} {how}.")

    def _leave_out(self, reason: str, count: int) -> None:
        if count:
            self.audit.left_out[reason] = self.audit.left_out.get(reason, 0) + count

    def _lengths_of(self, shard: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens of each document of a shard with its caption, and without it if it is a pair."""
        head = self.dataset.shards[shard]
        whole = full_lengths(head)
        return whole, whole - _caption_lengths(head)

    def _name(self, document: int) -> str:
        shard, index = locate_document(self.dataset, document)
        key = self.dataset.shards[shard].value("key", index)
        return f"{key} (document {index} of {self.dataset.manifest.shards[shard].name})"


def _caption_lengths(shard: IdShardHead) -> NDArray[np.int64]:
    """Text ids of each document that is a pair; 0 for others."""
    owner = np.repeat(np.arange(len(shard)), np.diff(shard.segment_starts))

    def total(values: NDArray[np.generic]) -> NDArray[np.int64]:
        return np.bincount(owner, weights=values, minlength=len(shard)).astype(np.int64)

    is_text = shard.segment_kinds == TEXT
    is_pair = (total(is_text) == 1) & (total(shard.segment_kinds == IMAGE) == 1)
    return np.where(is_pair, total(is_text * shard.segment_lengths), 0)
