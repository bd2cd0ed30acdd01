"""Training rows of constant shape from an id set.

Everything here is a pure function of (fingerprint, seed, row number): there is no stream, no buffer and no rank in the state, so a run
resumes exactly on any number of data-parallel ranks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lavit_dist.config.documents import DEFAULT_DOCUMENTS, DocumentsConfig
from lavit_dist.config.id_cache import IdCacheConfig
from lavit_dist.data.document_tokens import write_tokens
from lavit_dist.data.documents import full_lengths
from lavit_dist.data.epoch_plan import EpochPlan, planned
from lavit_dist.data.id_shard import IdShardHead
from lavit_dist.data.id_shards import IdShards
from lavit_dist.data.manifest import Manifest
from lavit_dist.data.micro_batch import ModalityWeights
from lavit_dist.data.order import BLOCK_DOCUMENTS, ROWS, block_places, epoch_blocks, permutation
from lavit_dist.data.packing import PACKER_VERSION, pack
from lavit_dist.data.spans import Spans, epoch_spans, usable
from lavit_dist.data.too_long import report_too_long
from lavit_dist.errors import UserError, check
from lavit_dist.models.vocabulary import Vocabulary

CACHED_BLOCKS = 4
"""Packed blocks kept: a global batch touches one or two."""
CACHED_EPOCHS = 2
"""Epochs whose grouping into blocks is kept."""


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
        manifest: Manifest,
        vocabulary: Vocabulary,
        eos_id: int,
        seq_len: int,
        seed: int,
        caption_dropout: float,
        policy: DocumentsConfig = DEFAULT_DOCUMENTS,
        *,
        id_cache: IdCacheConfig | None = None,
        verify: bool = True,
        min_block_documents: int = BLOCK_DOCUMENTS,
        plans: Path | None = None,
    ) -> None:
        """Reads the plan of the first epoch, which is made if the folder `plans` doesn't hold it; `verify` checks that every shard is
        there and the sha256 of local ones (one rank is enough). `id_cache` says where shards are kept if the set lies in a store.

        Raises `UserError` when the set is damaged, of another vocabulary, has no document that fits a row, or one too long for the policy.
        """
        self.manifest = manifest
        encoding = manifest.encoding
        codebook_size = encoding.codebook_size if encoding.has_images else vocabulary.codebook_size
        check(
            (encoding.text_vocab_size, codebook_size) == (vocabulary.text_size, vocabulary.codebook_size),
            f"The ids in {manifest.folder} have {encoding.text_vocab_size} text ids and {encoding.codebook_size} codes, but this run has"
            f" {vocabulary.text_size} and {vocabulary.codebook_size}; give both the same text tokenizer and visual tokenizer.",
        )
        self.shards = IdShards(manifest, id_cache)
        if verify:
            self.shards.check_sizes()
            self.shards.check_digests()
        self.vocabulary, self.eos_id, self.seq_len = vocabulary, eos_id, seq_len
        self.seed, self.caption_dropout, self.min_block_documents = seed, caption_dropout, min_block_documents
        self.policy = policy
        self.shard_starts = np.cumsum([0, *(shard.documents for shard in manifest.shards)])
        self.plans = plans
        self._current: tuple[int, int] | None = None
        self._planning = threading.Lock()
        self._epoch_starts = [0]
        self._plans: list[EpochPlan] = []
        self._row_ends: list[NDArray[np.int64]] = []
        self._blocks_of_epoch = lru_cache(maxsize=CACHED_EPOCHS)(self._group_blocks)
        self.block = lru_cache(maxsize=CACHED_BLOCKS)(self._pack_block)
        self._plan_epoch(0)
        self._check_lengths()

    @property
    def num_documents(self) -> int:
        """Documents that can be in an epoch; under the policy `captions: one` it has one of each image."""
        return int(self._plans[0].usable.sum())

    @property
    def total_tokens(self) -> int:
        """Tokens of those documents with their captions, padding not counted."""
        return int(self._plans[0].usable @ np.arange(len(self._plans[0].usable)))

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
        while len(self._epoch_starts) <= epoch:
            self._plan_epoch(len(self._epoch_starts) - 1)
        return self._epoch_starts[epoch]

    def locate(self, row: int) -> tuple[int, int, int]:
        """(epoch, block, row within the block) of a row counted from the start of the run."""
        while self._epoch_starts[-1] <= row:
            self._plan_epoch(len(self._epoch_starts) - 1)
        epoch = int(np.searchsorted(self._epoch_starts, row, side="right")) - 1
        within = row - self._epoch_starts[epoch]
        ends = self._row_ends[epoch]
        block = int(np.searchsorted(ends, within, side="right"))
        return epoch, block, within - (int(ends[block - 1]) if block else 0)

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
        epoch, block, _ = self.locate(row)
        self._look_ahead(epoch, block)
        spans = self.row_spans(row)
        ends = np.cumsum(spans.lengths)
        places = ends - spans.lengths
        tokens = np.empty(spans.lengths.sum(), np.int64)
        shard_of = np.searchsorted(self.shard_starts, spans.documents, side="right") - 1
        for shard in np.unique(shard_of).tolist():
            here = np.flatnonzero(shard_of == shard)
            write_tokens(
                tokens,
                places[here],
                self.shards[shard],
                spans[here].numbered_from(self.shard_starts[shard]),
                vocabulary=self.vocabulary,
                eos_id=self.eos_id,
            )
        return [tokens[start:end] for start, end in zip(places.tolist(), ends.tolist(), strict=True)]

    def _look_ahead(self, epoch: int, block: int) -> None:
        """Has the shards of a block that is begun fetched, and those of the next."""
        if (epoch, block) != self._current:
            self._current = epoch, block
            blocks = self._blocks_of_epoch(epoch)
            following = blocks[block + 1] if block + 1 < len(blocks) else self._blocks_of_epoch(epoch + 1)[0]
            self.shards.prefetch([*blocks[block].tolist(), *following.tolist()])

    def _group_blocks(self, epoch: int) -> list[NDArray[np.int64]]:
        return epoch_blocks(self.shard_starts, self.seed, epoch, self.min_block_documents)

    def _plan_epoch(self, epoch: int) -> None:
        """Appends the plan of the next epoch, `epoch`, unless another thread has done so in between."""
        with self._planning:
            if epoch < len(self._plans):
                return
            path = self.plans / f"{self.plan_digest[:32]}-epoch{epoch}.json" if self.plans else None
            plan = planned(
                path, len(self._blocks_of_epoch(epoch)), lambda block: self._plan_block(epoch, block), self.shards.head_threads
            )
            self._plans.append(plan)
            self._row_ends.append(np.cumsum(plan.rows))
            self._epoch_starts.append(self._epoch_starts[-1] + plan.num_rows)  # the last, for it is what others look at

    def _plan_block(self, epoch: int, block: int) -> EpochPlan:
        heads = [self.shards.head(shard) for shard in self._blocks_of_epoch(epoch)[block].tolist()]
        lengths = [full_lengths(head) for head in heads]
        can_be = [usable(head, of_head, self.seq_len, self.policy.too_long) for head, of_head in zip(heads, lengths, strict=True)]
        spans, order = self._block_spans(epoch, block, heads, can_be)
        num_rows = int(pack(spans.lengths[order], self.seq_len).max(initial=-1)) + 1
        every = np.concatenate(lengths)
        return EpochPlan(np.array([num_rows]), np.bincount(every), np.bincount(every[np.concatenate(can_be)]))

    def _block_spans(
        self, epoch: int, block: int, heads: Sequence[IdShardHead], can_be: Sequence[NDArray[np.bool_]]
    ) -> tuple[Spans, NDArray[np.int64]]:
        """What an epoch has of the shards of a block, whose documents `can_be` in it or not; and the shuffled order of that."""
        shards = self._blocks_of_epoch(epoch)[block]
        of_shards = [
            epoch_spans(
                head,
                of_head,
                self.policy,
                seq_len=self.seq_len,
                seed=self.seed,
                epoch=epoch,
                caption_dropout=self.caption_dropout,
            )
            for head, of_head in zip(heads, can_be, strict=True)
        ]
        firsts = np.cumsum([0, *map(len, heads)])
        spans = Spans.joined(of_shards, firsts[:-1].tolist())
        order = spans.shuffled_by(block_places(int(firsts[-1]), self.seed, epoch, block))
        numbers = np.concatenate([np.arange(self.shard_starts[shard], self.shard_starts[shard + 1]) for shard in shards])
        return dataclasses.replace(spans, documents=numbers[spans.documents]), order

    def _pack_block(self, epoch: int, block: int) -> PackedBlock:
        shards = [self.shards[shard] for shard in self._blocks_of_epoch(epoch)[block].tolist()]
        can_be = [usable(shard, full_lengths(shard), self.seq_len, self.policy.too_long) for shard in shards]
        spans, order = self._block_spans(epoch, block, shards, can_be)
        spans = spans[order]
        row_of = pack(spans.lengths, self.seq_len)
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
        labels = [np.bincount(row_of, weights=of_spans, minlength=num_rows) for of_spans in spans.labels.T]
        return PackedBlock(spans[by_row], np.concatenate([[0], np.cumsum(counts)]), np.stack(labels, axis=1).astype(np.int64))

    def _check_lengths(self) -> None:
        lengths = self._plans[0].lengths
        longest = len(lengths) - 1
        check(
            self.num_documents > 0,
            f"seq_len {self.seq_len} is too short for every document in {self.manifest.folder}; the longest needs {longest}.",
        )
        report_too_long(
            self.policy.too_long,
            self.manifest.folder,
            seq_len=self.seq_len,
            documents=int(lengths.sum()),
            too_long=int(lengths[self.seq_len + 1 :].sum()),
            left_out=int(lengths.sum()) - self.num_documents,
            longest=longest,
        )
