"""Training rows of constant shape from an id set.

Everything here is a pure function of (fingerprint, seed, row number): there is no stream, no buffer and no rank in the state, so a run
resumes exactly on any number of data-parallel ranks.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lavit_dist.config.id_cache import IdCacheConfig
from lavit_dist.data.documents import DocumentTable, arrange, caption_dropped, text_first, to_tokens
from lavit_dist.data.id_shards import IdShards
from lavit_dist.data.manifest import load_manifest
from lavit_dist.data.order import BLOCK_DOCUMENTS, ROWS, block_documents, epoch_blocks, permutation
from lavit_dist.data.packing import PACKER_VERSION, best_fit_decreasing
from lavit_dist.errors import check
from lavit_dist.models.vocabulary import Vocabulary

logger = logging.getLogger(__name__)
CACHED_BLOCKS = 4
"""Packed blocks kept: a global batch touches one or two."""


@dataclass(frozen=True)
class PackedBlock:
    """The rows of one block of one epoch."""

    documents: NDArray[np.int64]
    """Documents row after row."""
    row_starts: NDArray[np.int64]
    """Row r holds `documents[row_starts[r] : row_starts[r + 1]]`."""
    supervised: NDArray[np.int64]
    """Tokens of each row that have a label: all but the last of each document."""

    @property
    def num_rows(self) -> int:
        return len(self.supervised)


class RowDataset:
    """The endless sequence of packed rows of one id set: epoch after epoch, every document once in each.

    A document is never cut. One that is longer than `seq_len` with its caption is left out of every epoch, with a warning of how many.
    """

    def __init__(
        self,
        folder: str | Path,
        vocabulary: Vocabulary,
        eos_id: int,
        seq_len: int,
        seed: int,
        caption_dropout: float,
        *,
        id_cache: IdCacheConfig | None = None,
        verify: bool = True,
        min_block_documents: int = BLOCK_DOCUMENTS,
    ) -> None:
        """Reads the manifest and the lengths; `verify` checks that every shard is there and the sha256 of local ones (one rank is enough).

        `id_cache` says where shards are kept if `folder` is the URL of a store.

        Raises `UserError` when the set is damaged, of another vocabulary, or has no document that fits a row.
        """
        id_cache = id_cache or IdCacheConfig()
        self.manifest = load_manifest(folder, id_cache.storage_options)
        encoding = self.manifest.encoding
        check(
            (encoding.text_vocab_size, encoding.codebook_size) == (vocabulary.text_size, vocabulary.codebook_size),
            f"The ids in {folder} have {encoding.text_vocab_size} text ids and {encoding.codebook_size} codes, but this run has"
            f" {vocabulary.text_size} and {vocabulary.codebook_size}; give both the same text tokenizer and visual tokenizer.",
        )
        self.shards = IdShards(self.manifest, id_cache)
        if verify:
            self.shards.check_sizes()
            self.shards.check_digests()
        self.vocabulary, self.eos_id, self.seq_len = vocabulary, eos_id, seq_len
        self.seed, self.caption_dropout, self.min_block_documents = seed, caption_dropout, min_block_documents
        self.table = DocumentTable.of(self.shards.heads())
        self.fits = self.table.full_lengths <= seq_len
        self._check_lengths(folder)
        self._current: tuple[int, int] | None = None
        self._block_names: list[tuple[int, int]] = []
        self._row_ends: list[int] = []
        self._blocks_of_epoch = lru_cache(maxsize=2)(self._group_blocks)
        self.block = lru_cache(maxsize=CACHED_BLOCKS)(self._pack_block)

    @property
    def num_documents(self) -> int:
        """Documents of an epoch."""
        return int(self.fits.sum())

    @property
    def total_tokens(self) -> int:
        """Tokens of an epoch in which no caption is dropped, padding not counted."""
        return int(self.table.full_lengths[self.fits].sum())

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
        epoch, block, index = self.locate(row)
        return int(self.block(epoch, block).supervised[index])

    def row_documents(self, row: int) -> tuple[int, NDArray[np.int64]]:
        """The epoch of a row and its documents in order."""
        epoch, block, index = self.locate(row)
        packed = self.block(epoch, block)
        return epoch, packed.documents[packed.row_starts[index] : packed.row_starts[index + 1]]

    def row_tokens(self, row: int) -> list[NDArray[np.int64]]:
        """The tokens of each document of a row."""
        epoch, documents = self.row_documents(row)
        self._look_ahead(row)
        hashes = self.table.hashes[documents]
        leads = text_first(hashes, self.seed, epoch)
        drops = caption_dropped(hashes, self.seed, epoch, self.caption_dropout)
        shard_of = np.searchsorted(self.table.shard_starts, documents, side="right") - 1
        within = documents - self.table.shard_starts[shard_of]
        tokens = []
        for shard, index, text_leads, drop in zip(shard_of.tolist(), within.tolist(), leads.tolist(), drops.tolist(), strict=True):
            segments = arrange(self.shards[shard].segments(index), text_leads=text_leads, drop_caption=drop)
            tokens.append(to_tokens(segments, self.vocabulary, self.eos_id))
        return tokens

    def _look_ahead(self, row: int) -> None:
        """Has the shards of a block that is begun fetched, and those of the next."""
        epoch, block, _ = self.locate(row)
        if (epoch, block) != self._current:
            self._current = epoch, block
            blocks = self._blocks_of_epoch(epoch)
            following = blocks[block + 1] if block + 1 < len(blocks) else self._blocks_of_epoch(epoch + 1)[0]
            self.shards.prefetch([*blocks[block].tolist(), *following.tolist()])

    def _group_blocks(self, epoch: int) -> list[NDArray[np.int64]]:
        return epoch_blocks(self.table.shard_starts, self.seed, epoch, self.min_block_documents)

    def _pack_block(self, epoch: int, block: int) -> PackedBlock:
        shards = self._blocks_of_epoch(epoch)[block]
        documents = block_documents(shards, self.table.shard_starts, self.seed, epoch, block)
        documents = documents[self.fits[documents]]
        lengths = self.table.lengths(documents, self.seed, epoch, self.caption_dropout)
        row_of = best_fit_decreasing(lengths, self.seq_len)
        num_rows = int(row_of.max(initial=-1)) + 1
        # Packing fills rows with documents of like length, one size after the other; their order must not show in training.
        row_of = permutation(num_rows, self.seed, epoch, ROWS, block)[row_of]
        by_row = np.argsort(row_of, kind="stable")
        counts = np.bincount(row_of, minlength=num_rows)
        supervised = np.bincount(row_of, weights=lengths - 1, minlength=num_rows).astype(np.int64)
        return PackedBlock(documents[by_row], np.concatenate([[0], np.cumsum(counts)]), supervised)

    def _append_block(self) -> None:
        epoch, block = self._block_names[-1] if self._block_names else (0, -1)
        following = (epoch, block + 1) if block + 1 < len(self._blocks_of_epoch(epoch)) else (epoch + 1, 0)
        self._row_ends.append((self._row_ends[-1] if self._row_ends else 0) + self.block(*following).num_rows)
        self._block_names.append(following)

    def _check_lengths(self, folder: str | Path) -> None:
        longest = int(self.table.full_lengths.max())
        check(
            bool(self.fits.any()),
            f"seq_len {self.seq_len} is too short for every document in {folder}; the longest needs {longest}.",
        )
        too_long = len(self.fits) - self.num_documents
        if too_long:
            logger.warning(
                "%d of %d documents in %s are longer than seq_len %d (the longest has %d tokens) and are left out",
                too_long, len(self.fits), folder, self.seq_len, longest,
            )  # fmt: skip
