"""Training rows of constant shape from an id set.

Everything here is a pure function of (fingerprint, seed, row number): there is no stream, no buffer and no rank in the state, so a run
resumes exactly on any number of data-parallel ranks.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lavit_dist.config.id_cache import IdCacheConfig
from lavit_dist.data.document_tokens import write_tokens
from lavit_dist.data.documents import ShardDocuments, caption_dropped, text_first
from lavit_dist.data.epoch_plan import EpochPlan, planned
from lavit_dist.data.id_shard import IdShardHead
from lavit_dist.data.id_shards import IdShards
from lavit_dist.data.manifest import load_manifest
from lavit_dist.data.order import BLOCK_DOCUMENTS, DOCUMENTS, ROWS, epoch_blocks, permutation
from lavit_dist.data.packing import PACKER_VERSION, pack
from lavit_dist.errors import UserError, check
from lavit_dist.models.vocabulary import Vocabulary

logger = logging.getLogger(__name__)
CACHED_BLOCKS = 4
"""Packed blocks kept: a global batch touches one or two."""
CACHED_EPOCHS = 2
"""Epochs whose grouping into blocks is kept."""


@dataclass(frozen=True)
class BlockDocuments:
    """The documents of a block that fit a row, in their shuffled order, as an epoch has them."""

    documents: NDArray[np.int64]
    """Numbers within the set."""
    lengths: NDArray[np.int64]
    """Tokens."""
    text_leads: NDArray[np.bool_]
    """Whether a pair is ordered [text, image]."""
    drops_caption: NDArray[np.bool_]
    """Whether a pair loses its text."""


@dataclass(frozen=True)
class PackedBlock:
    """The rows of one block of one epoch: `documents`, row after row."""

    documents: NDArray[np.int64]
    lengths: NDArray[np.int64]
    text_leads: NDArray[np.bool_]
    drops_caption: NDArray[np.bool_]
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
        plans: Path | None = None,
    ) -> None:
        """Reads the manifest and the plan of the first epoch, which is made if the folder `plans` doesn't hold it; `verify` checks that
        every shard is there and the sha256 of local ones (one rank is enough). `id_cache` says where shards are kept if `folder` is the
        URL of a store.

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
        self.shard_starts = np.cumsum([0, *(shard.documents for shard in self.manifest.shards)])
        self.plans = plans
        self._current: tuple[int, int] | None = None
        self._epoch_starts = [0]
        self._plans: list[EpochPlan] = []
        self._row_ends: list[NDArray[np.int64]] = []
        self._blocks_of_epoch = lru_cache(maxsize=CACHED_EPOCHS)(self._group_blocks)
        self.block = lru_cache(maxsize=CACHED_BLOCKS)(self._pack_block)
        self._plan_epoch()
        self._check_lengths(folder)

    @property
    def num_documents(self) -> int:
        """Documents of an epoch."""
        return int(self._fitting.sum())

    @property
    def total_tokens(self) -> int:
        """Tokens of an epoch in which no caption is dropped, padding not counted."""
        return int(self._fitting @ np.arange(len(self._fitting)))

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
        while len(self._plans) < epoch:
            self._plan_epoch()
        return self._epoch_starts[epoch]

    def locate(self, row: int) -> tuple[int, int, int]:
        """(epoch, block, row within the block) of a row counted from the start of the run."""
        while self._epoch_starts[-1] <= row:
            self._plan_epoch()
        epoch = int(np.searchsorted(self._epoch_starts, row, side="right")) - 1
        within = row - self._epoch_starts[epoch]
        ends = self._row_ends[epoch]
        block = int(np.searchsorted(ends, within, side="right"))
        return epoch, block, within - (int(ends[block - 1]) if block else 0)

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
        epoch, block, index = self.locate(row)
        self._look_ahead(epoch, block)
        packed = self.block(epoch, block)
        these = slice(packed.row_starts[index], packed.row_starts[index + 1])
        documents, lengths = packed.documents[these], packed.lengths[these]
        starts = np.cumsum(lengths) - lengths
        tokens = np.empty(lengths.sum(), np.int64)
        shard_of = np.searchsorted(self.shard_starts, documents, side="right") - 1
        for shard in np.unique(shard_of).tolist():
            here = shard_of == shard
            write_tokens(
                tokens,
                starts[here],
                lengths[here],
                self.shards[shard],
                documents[here] - self.shard_starts[shard],
                text_leads=packed.text_leads[these][here],
                drops_caption=packed.drops_caption[these][here],
                vocabulary=self.vocabulary,
                eos_id=self.eos_id,
            )
        return [tokens[start : start + length] for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)]

    @property
    def _fitting(self) -> NDArray[np.int64]:
        return self._plans[0].lengths[: self.seq_len + 1]

    def _look_ahead(self, epoch: int, block: int) -> None:
        """Has the shards of a block that is begun fetched, and those of the next."""
        if (epoch, block) != self._current:
            self._current = epoch, block
            blocks = self._blocks_of_epoch(epoch)
            following = blocks[block + 1] if block + 1 < len(blocks) else self._blocks_of_epoch(epoch + 1)[0]
            self.shards.prefetch([*blocks[block].tolist(), *following.tolist()])

    def _group_blocks(self, epoch: int) -> list[NDArray[np.int64]]:
        return epoch_blocks(self.shard_starts, self.seed, epoch, self.min_block_documents)

    def _plan_epoch(self) -> None:
        epoch = len(self._plans)
        path = self.plans / f"{self.plan_digest[:32]}-epoch{epoch}.json" if self.plans else None
        plan = planned(
            path, len(self._blocks_of_epoch(epoch)), lambda block: self._plan_block(epoch, block), self.shards.head_threads
        )
        self._plans.append(plan)
        self._row_ends.append(np.cumsum(plan.rows))
        self._epoch_starts.append(self._epoch_starts[-1] + plan.num_rows)

    def _plan_block(self, epoch: int, block: int) -> EpochPlan:
        documents, full_lengths = self._block_documents(epoch, block, self.shards.head)
        num_rows = int(pack(documents.lengths, self.seq_len).max(initial=-1)) + 1
        return EpochPlan(np.array([num_rows]), np.bincount(full_lengths))

    def _block_documents(
        self, epoch: int, block: int, head: Callable[[int], IdShardHead]
    ) -> tuple[BlockDocuments, NDArray[np.int64]]:
        """The documents of a block, and the tokens with the caption of each, those that don't fit among them; `head` gives a shard's."""
        shards = self._blocks_of_epoch(epoch)[block]
        of = ShardDocuments.joined([ShardDocuments.of(head(shard)) for shard in shards.tolist()])
        numbers = np.concatenate([np.arange(self.shard_starts[shard], self.shard_starts[shard + 1]) for shard in shards])
        order = permutation(len(numbers), self.seed, epoch, DOCUMENTS, block)
        order = order[of.full_lengths[order] <= self.seq_len]
        hashes = of.hashes[order]
        drops = caption_dropped(hashes, self.seed, epoch, self.caption_dropout)
        documents = BlockDocuments(
            documents=numbers[order],
            lengths=np.where(drops, of.short_lengths[order], of.full_lengths[order]),
            text_leads=text_first(hashes, self.seed, epoch),
            drops_caption=drops,
        )
        return documents, of.full_lengths

    def _pack_block(self, epoch: int, block: int) -> PackedBlock:
        of, _ = self._block_documents(epoch, block, self.shards.__getitem__)
        row_of = pack(of.lengths, self.seq_len)
        num_rows = int(row_of.max(initial=-1)) + 1
        if num_rows != self._plans[epoch].rows[block]:
            raise UserError(
                f"Block {block} of epoch {epoch} of {self.manifest.folder} has {num_rows} rows, but its plan says"
                f" {self._plans[epoch].rows[block]}: the shards or the plan in {self.plans} were changed since; restore the shards,"
                " and remove that folder."
            )
        # The last rows hold what is left over; their order must not show in training.
        row_of = permutation(num_rows, self.seed, epoch, ROWS, block)[row_of]
        by_row = np.argsort(row_of, kind="stable")
        counts = np.bincount(row_of, minlength=num_rows)
        supervised = np.bincount(row_of, weights=of.lengths - 1, minlength=num_rows).astype(np.int64)
        return PackedBlock(
            documents=of.documents[by_row],
            lengths=of.lengths[by_row],
            text_leads=of.text_leads[by_row],
            drops_caption=of.drops_caption[by_row],
            row_starts=np.concatenate([[0], np.cumsum(counts)]),
            supervised=supervised,
        )

    def _check_lengths(self, folder: str | Path) -> None:
        lengths = self._plans[0].lengths
        longest = len(lengths) - 1
        check(
            self.num_documents > 0,
            f"seq_len {self.seq_len} is too short for every document in {folder}; the longest needs {longest}.",
        )
        too_long = int(lengths.sum()) - self.num_documents
        if too_long:
            logger.warning(
                "%d of %d documents in %s are longer than seq_len %d (the longest has %d tokens) and are left out",
                too_long, int(lengths.sum()), folder, self.seq_len, longest,
            )  # fmt: skip
