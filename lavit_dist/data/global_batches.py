"""The global batch of each step: consecutive rows, shared out to data-parallel ranks. No rank is part of the state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavit_dist.data.kept_manifest import check_fingerprint
from lavit_dist.data.micro_batch import MicroBatch, lay_out
from lavit_dist.data.rows import RowDataset
from lavit_dist.errors import check


class GlobalBatches:
    """Step s trains on rows s*G to (s+1)*G of a `RowDataset`; row r of those goes to data rank r % data_size."""

    def __init__(self, rows: RowDataset, global_batch_size: int) -> None:
        self.rows = rows
        self.global_batch_size = global_batch_size

    def supervised_tokens(self, step: int) -> int:
        """Tokens of the global batch that have a label."""
        first = step * self.global_batch_size
        return sum(self.rows.supervised_tokens(row) for row in range(first, first + self.global_batch_size))

    def micro_batches(self, step: int, data_rank: int, data_size: int, micro_batch_size: int) -> list[MicroBatch]:
        """The part of data rank `data_rank`, in rows of `micro_batch_size`. Raises `UserError` when it doesn't divide evenly."""
        check(
            self.global_batch_size % (data_size * micro_batch_size) == 0,
            f"global_batch_size {self.global_batch_size} is not a multiple of data-parallel size {data_size} x micro_batch_size"
            f" {micro_batch_size}; choose a multiple of {data_size * micro_batch_size}.",
        )
        first = step * self.global_batch_size
        mine = range(first + data_rank, first + self.global_batch_size, data_size)
        weight = 1.0 / self.supervised_tokens(step)
        return [
            lay_out(
                [self.rows.row_tokens(row) for row in mine[start : start + micro_batch_size]],
                vocabulary=self.rows.vocabulary,
                eos_id=self.rows.eos_id,
                seq_len=self.rows.seq_len,
                weight=weight,
            )
            for start in range(0, len(mine), micro_batch_size)
        ]

    def state(self, step: int) -> dict[str, Any]:
        """Where step `step` begins. Nothing in it depends on ranks."""
        row = step * self.global_batch_size
        return {
            "fingerprint": self.rows.manifest.fingerprint,
            "plan_digest": self.rows.plan_digest,
            "seed": self.rows.seed,
            "epoch": self.rows.locate(row)[0],
            "rows_consumed": row,
        }

    def check_state(self, state: Mapping[str, Any], kept: Path | None = None) -> None:
        """Raises `UserError` when a run with this `state` trained on other data or rows than these.

        It names the shards that differ where the folder `kept` has the manifest that the run was started with.
        """
        check_fingerprint(state["fingerprint"], self.rows.manifest, kept)
        check(
            state["plan_digest"] == self.rows.plan_digest,
            f"The checkpoint's rows were packed from {self.rows.manifest.folder} with another seed, seq_len, caption_dropout or version of the packer;"
            " restore those settings, or start a new run.",
        )
