"""The global batch of each step: consecutive rows, shared out to data-parallel ranks. No rank is part of the state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavit_dist.data.micro_batch import MicroBatch, lay_out
from lavit_dist.data.mixed_rows import MixedRows
from lavit_dist.data.rows import RowDataset
from lavit_dist.errors import check


class GlobalBatches:
    """Step s trains on rows s*G to (s+1)*G, of one id set or a mixture; row r of those goes to data rank r % data_size.

    After `skip(n)` it trains on those n*G later.
    """

    def __init__(self, rows: RowDataset | MixedRows, global_batch_size: int) -> None:
        self.rows = rows if isinstance(rows, MixedRows) else MixedRows.of(rows)
        self.global_batch_size = global_batch_size
        self.skipped = 0
        """How many batches were left out."""

    def skip(self, count: int) -> None:
        """Leaves out `count` batches from here on."""
        self.skipped += count

    def _first_row(self, step: int) -> int:
        return (step + self.skipped) * self.global_batch_size

    def labels(self, step: int) -> tuple[int, int]:
        """Tokens of text and of images that have a label in the global batch; known from lengths alone."""
        first = self._first_row(step)
        of_rows = [self.rows.labels(row) for row in range(first, first + self.global_batch_size)]
        return sum(text for text, _ in of_rows), sum(image for _, image in of_rows)

    def total_weight(self, step: int) -> float:
        """What the labels of the global batch weigh together, a token of text and one of an image as the policy says.

        Raises `UserError` when there is no label.
        """
        text, image = self.labels(step)
        weights = self.rows.modality_weights
        check(
            text + image > 0,
            f"No token of the global batch of step {step} has a loss; raise global_batch_size or seq_len, or let documents.supervise,"
            " documents.text_loss_weight and documents.image_loss_weight leave more.",
        )
        return text * weights.text + image * weights.image

    def micro_batches(self, step: int, data_rank: int, data_size: int, micro_batch_size: int) -> list[MicroBatch]:
        """The part of data rank `data_rank`, in rows of `micro_batch_size`. Raises `UserError` when it doesn't divide evenly."""
        check(
            self.global_batch_size % (data_size * micro_batch_size) == 0,
            f"global_batch_size {self.global_batch_size} is not a multiple of data-parallel size {data_size} x micro_batch_size"
            f" {micro_batch_size}; choose a multiple of {data_size * micro_batch_size}.",
        )
        first = self._first_row(step)
        mine = range(first + data_rank, first + self.global_batch_size, data_size)
        weight = 1.0 / self.total_weight(step)
        return [
            lay_out(
                [self.rows.row_tokens(row) for row in mine[start : start + micro_batch_size]],
                vocabulary=self.rows.vocabulary,
                eos_id=self.rows.eos_id,
                seq_len=self.rows.seq_len,
                weight=weight,
                modality_weights=self.rows.modality_weights,
                given=[self.rows.row_spans(row).given.tolist() for row in mine[start : start + micro_batch_size]],
            )
            for start in range(0, len(mine), micro_batch_size)
        ]

    def check_suffice(self, total_steps: int) -> None:
        """Raises `UserError` when the rows end before `total_steps`."""
        self.rows.check_suffice(self._first_row(total_steps))

    def shares_consumed(self, step: int) -> dict[str, float]:
        """The share of each source in the rows before step `step`; nothing where there is one source alone."""
        shares = self.rows.shares_consumed(self._first_row(step))
        return shares if len(shares) > 1 else {}

    def state(self, step: int) -> dict[str, Any]:
        """Where step `step` begins. Nothing in it depends on ranks."""
        return self.rows.state(self._first_row(step)) | {"batches_skipped": self.skipped}

    def check_state(self, state: Mapping[str, Any], kept: Path | None = None) -> None:
        """Raises `UserError` when a run with this `state` trained on other data or rows than these.

        It names the shards that differ where the folder `kept` has the manifests that the run was started with.
        """
        self.rows.check_state(state, kept)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`. Raises `UserError` when a run with it trained on other data or rows than these."""
        self.rows.load_state(state)
        self.skipped = state["batches_skipped"]
