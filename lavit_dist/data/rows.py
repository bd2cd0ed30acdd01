"""Training rows of constant shape from an id set.

Everything here is a pure function of (fingerprint, seed, row number): there is no stream, no buffer and no rank in the state, so a run
resumes exactly on any number of data-parallel ranks.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lavit_dist.config.documents import DEFAULT_DOCUMENTS, DocumentsConfig
from lavit_dist.data.documents import DocumentTable, arrange, to_tokens
from lavit_dist.data.id_shard import IdShard
from lavit_dist.data.manifest import load_manifest
from lavit_dist.data.micro_batch import ModalityWeights
from lavit_dist.data.order import BLOCK_DOCUMENTS, ROWS, block_documents, epoch_blocks, permutation
from lavit_dist.data.packing import PACKER_VERSION, best_fit_decreasing
from lavit_dist.data.spans import Spans, epoch_spans, usable
from lavit_dist.data.too_long import report_too_long
from lavit_dist.errors import check
from lavit_dist.models.vocabulary import Vocabulary

CACHED_BLOCKS = 4
"""Packed blocks kept: a global batch touches one or two."""


@dataclass(frozen=True)
class PackedBlock:
    """The rows of one block of one epoch."""

    spans: Spans
    """What the rows hold, row after row."""
    row_starts: NDArray[np.int64]
    """Row r holds `spans[row_starts[r] : row_starts[r + 1]]`."""
    labels: NDArray[np.int64]
    """Tokens with a label, [row, 2]: of text, of images."""

    @property
    def num_rows(self) -> int:
        return len(self.labels)


class RowDataset:
    """The endless sequence of packed rows of one id set: epoch after epoch, every document once in each.

    Of an image with several captions, and of documents longer than `seq_len` with their caption, each epoch has what the policy says.
    """

    def __init__(
        self,
        folder: str | Path,
        vocabulary: Vocabulary,
        eos_id: int,
        seq_len: int,
        seed: int,
        caption_dropout: float,
        policy: DocumentsConfig = DEFAULT_DOCUMENTS,
        *,
        verify: bool = True,
        min_block_documents: int = BLOCK_DOCUMENTS,
    ) -> None:
        """Reads the manifest and the lengths; `verify` reads every shard to check its sha256 (one rank is enough).

        Raises `UserError` when the set is damaged, of another vocabulary, has no document that fits a row, or one too long for the policy.
        """
        self.manifest = load_manifest(folder)
        encoding = self.manifest.encoding
        check(
            (encoding.text_vocab_size, encoding.codebook_size) == (vocabulary.text_size, vocabulary.codebook_size),
            f"The ids in {folder} have {encoding.text_vocab_size} text ids and {encoding.codebook_size} codes, but this run has"
            f" {vocabulary.text_size} and {vocabulary.codebook_size}; give both the same text tokenizer and visual tokenizer.",
        )
        if verify:
            self.manifest.check_files()
        self.vocabulary, self.eos_id, self.seq_len = vocabulary, eos_id, seq_len
        self.seed, self.caption_dropout, self.min_block_documents = seed, caption_dropout, min_block_documents
        self.policy = policy
        self.shards = [IdShard(self.manifest.folder / shard.name) for shard in self.manifest.shards]
        self.table = DocumentTable.of(self.shards)
        self.usable = [
            usable(shard, self._full_lengths(index), seq_len, policy.too_long) for index, shard in enumerate(self.shards)
        ]
        self._check_lengths(folder)
        self._block_names: list[tuple[int, int]] = []
        self._row_ends: list[int] = []
        self._blocks_of_epoch = lru_cache(maxsize=2)(self._group_blocks)
        self.block = lru_cache(maxsize=CACHED_BLOCKS)(self._pack_block)

    @property
    def num_documents(self) -> int:
        """Documents that can be in an epoch; under the policy `captions: one` it has one of each image."""
        return sum(int(of_shard.sum()) for of_shard in self.usable)

    @property
    def total_tokens(self) -> int:
        """Tokens of those documents with their captions, padding not counted."""
        return sum(int(self._full_lengths(index)[of_shard].sum()) for index, of_shard in enumerate(self.usable))

    @property
    def modality_weights(self) -> ModalityWeights:
        """What a label weighs."""
        return ModalityWeights(self.policy.text_loss_weight, self.policy.image_loss_weight)

    @property
    def plan_digest(self) -> str:
        """Names everything that decides the rows besides the epoch."""
        plan = {
            "fingerprint": self.manifest.fingerprint,
            "packer_version": PACKER_VERSION,
            "min_block_documents": self.min_block_documents,
            "seq_len": self.seq_len,
            "seed": self.seed,
            "caption_dropout": self.caption_dropout,
            "captions": self.policy.captions,
            "splits": self.policy.too_long == "split",
        }
        return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()

    def rows_before_epoch(self, epoch: int) -> int:
        """Rows of all epochs before `epoch`."""
        while not self._block_names or self._block_names[-1][0] < epoch:
            self._append_block()
        first = bisect.bisect_left(self._block_names, (epoch, 0))
        return self._row_ends[first - 1] if first else 0

    def locate(self, row: int) -> tuple[int, int, int]:
        """(epoch, block, row within the block) of a row counted from the start of the run."""
        while not self._row_ends or self._row_ends[-1] <= row:
            self._append_block()
        index = bisect.bisect_right(self._row_ends, row)
        before = self._row_ends[index - 1] if index else 0
        return (*self._block_names[index], row - before)

    def supervised_tokens(self, row: int) -> int:
        """Tokens of a row that have a label; known from lengths alone."""
        return sum(self.labels(row))

    def labels(self, row: int) -> tuple[int, int]:
        """Tokens of text and of images in a row that have a label, for which a weight of 0 leaves none; known from lengths alone."""
        epoch, block, index = self.locate(row)
        text, image = self.block(epoch, block).labels[index].tolist()
        return text if self.policy.text_loss_weight else 0, image if self.policy.image_loss_weight else 0

    def row_documents(self, row: int) -> tuple[int, NDArray[np.int64]]:
        """The epoch of a row and its documents in order."""
        return self.locate(row)[0], self.row_spans(row).documents

    def row_spans(self, row: int) -> Spans:
        """What a row holds, in order."""
        epoch, block, index = self.locate(row)
        packed = self.block(epoch, block)
        return packed.spans[packed.row_starts[index] : packed.row_starts[index + 1]]

    def row_tokens(self, row: int) -> list[NDArray[np.int64]]:
        """The tokens of each document of a row, or of each piece of one."""
        spans = self.row_spans(row)
        documents = spans.documents
        shard_of = np.searchsorted(self.table.shard_starts, documents, side="right") - 1
        within = documents - self.table.shard_starts[shard_of]
        tokens = []
        columns = shard_of, within, spans.text_leads, spans.drops_caption, spans.starts, spans.lengths
        for shard, index, text_leads, drop, start, length in zip(*(column.tolist() for column in columns), strict=True):
            segments = arrange(self.shards[shard].segments(index), text_leads=text_leads, drop_caption=drop)
            tokens.append(to_tokens(segments, self.vocabulary, self.eos_id)[start : start + length])
        return tokens

    def _group_blocks(self, epoch: int) -> list[NDArray[np.int64]]:
        return epoch_blocks(self.table.shard_starts, self.seed, epoch, self.min_block_documents)

    def _pack_block(self, epoch: int, block: int) -> PackedBlock:
        shards = self._blocks_of_epoch(epoch)[block]
        documents = block_documents(shards, self.table.shard_starts, self.seed, epoch, block)
        of_shards = [self._shard_spans(shard, epoch) for shard in shards.tolist()]
        spans = Spans.joined(of_shards, self.table.shard_starts[shards].tolist()).in_order(documents)
        row_of = best_fit_decreasing(spans.lengths, self.seq_len)
        num_rows = int(row_of.max(initial=-1)) + 1
        # Packing fills rows with documents of like length, one size after the other; their order must not show in training.
        row_of = permutation(num_rows, self.seed, epoch, ROWS, block)[row_of]
        by_row = np.argsort(row_of, kind="stable")
        counts = np.bincount(row_of, minlength=num_rows)
        labels = [np.bincount(row_of, weights=of_spans, minlength=num_rows) for of_spans in spans.labels.T]
        return PackedBlock(spans[by_row], np.concatenate([[0], np.cumsum(counts)]), np.stack(labels, axis=1).astype(np.int64))

    def _shard_spans(self, shard: int, epoch: int) -> Spans:
        return epoch_spans(
            self.shards[shard],
            self.usable[shard],
            self.policy,
            seq_len=self.seq_len,
            seed=self.seed,
            epoch=epoch,
            caption_dropout=self.caption_dropout,
        )

    def _full_lengths(self, shard: int) -> NDArray[np.int64]:
        return self.table.full_lengths[self.table.shard_starts[shard] : self.table.shard_starts[shard + 1]]

    def _append_block(self) -> None:
        epoch, block = self._block_names[-1] if self._block_names else (0, -1)
        following = (epoch, block + 1) if block + 1 < len(self._blocks_of_epoch(epoch)) else (epoch + 1, 0)
        self._row_ends.append((self._row_ends[-1] if self._row_ends else 0) + self.block(*following).num_rows)
        self._block_names.append(following)

    def _check_lengths(self, folder: str | Path) -> None:
        longest = int(self.table.full_lengths.max())
        check(
            self.num_documents > 0,
            f"seq_len {self.seq_len} is too short for every document in {folder}; the longest needs {longest}.",
        )
        report_too_long(
            self.policy.too_long,
            folder,
            seq_len=self.seq_len,
            documents=len(self.table.full_lengths),
            too_long=int((self.table.full_lengths > self.seq_len).sum()),
            left_out=len(self.table.full_lengths) - self.num_documents,
            longest=longest,
        )
