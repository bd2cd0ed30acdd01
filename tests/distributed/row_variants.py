"""Other ways to lay the documents of a global batch out, and to supervise them; each is what training reads in place of its batches."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch

from lavit_dist.data.global_batches import GlobalBatches
from lavit_dist.data.micro_batch import UNSUPERVISED_LABEL, MicroBatch, lay_out

KEPT_OF_ODD_ROWS = 10
"""One of so many tokens stays supervised."""


class WholeBatches(ABC):
    """The interface of `GlobalBatches` over global batches that `whole` makes; row r goes to data rank r % data_size, as there."""

    def __init__(self, packed: GlobalBatches) -> None:
        self.packed = packed
        self.rows = packed.rows

    @abstractmethod
    def whole(self, step: int) -> MicroBatch:
        """All rows of the global batch."""

    def micro_batches(self, step: int, data_rank: int, data_size: int, micro_batch_size: int) -> list[MicroBatch]:
        whole = [getattr(self.whole(step), field.name)[data_rank::data_size] for field in dataclasses.fields(MicroBatch)]
        return [MicroBatch(*parts) for parts in zip(*(tensor.split(micro_batch_size) for tensor in whole), strict=True)]

    def state(self, step: int) -> dict[str, Any]:
        return self.packed.state(step)

    def load_state(self, state: dict[str, Any]) -> None:
        self.packed.load_state(state)

    def check_suffice(self, total_steps: int) -> None:
        self.packed.check_suffice(total_steps)

    def shares_consumed(self, step: int) -> dict[str, float]:
        return self.packed.shares_consumed(step)


class OneDocumentPerRow(WholeBatches):
    """The documents of each global batch, one per row of `seq_len`, then empty rows up to `num_rows`."""

    def __init__(self, packed: GlobalBatches, seq_len: int, num_rows: int) -> None:
        super().__init__(packed)
        self.seq_len, self.num_rows = seq_len, num_rows

    def whole(self, step: int) -> MicroBatch:
        first = step * self.packed.global_batch_size
        documents = [
            document for row in range(first, first + self.packed.global_batch_size) for document in self.rows.row_tokens(row)
        ]
        rows: list[list[np.ndarray]] = [[document] for document in documents]
        return lay_out(
            rows + [[] for _ in range(self.num_rows - len(rows))],
            vocabulary=self.rows.vocabulary,
            eos_id=self.rows.eos_id,
            seq_len=self.seq_len,
            weight=1.0 / self.packed.total_weight(step),
        )


class OneSidedSupervision(WholeBatches):
    """The packed rows, of which odd ones keep a tenth of their labels: of an even number of data ranks, half get a tenth."""

    def whole(self, step: int) -> MicroBatch:
        batch = self.packed.micro_batches(step, 0, 1, self.packed.global_batch_size)[0]
        supervised = batch.loss_weight > 0
        kept = supervised.clone()
        kept[1::2] &= supervised[1::2].cumsum(1) % KEPT_OF_ODD_ROWS == 0
        return dataclasses.replace(
            batch,
            labels=torch.where(kept, batch.labels, UNSUPERVISED_LABEL),
            modality=torch.where(kept, batch.modality, 0).to(batch.modality.dtype),
            loss_weight=kept.float() / kept.sum(),
        )
