"""The training loss of a head whose rows are shared out over tensor-parallel ranks, and what is reported of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor, nn

from lavit_dist.models.vocabulary import Table
from lavit_dist.parallel.linear_cross_entropy import LinearCrossEntropy, TableShare
from lavit_dist.parallel.llama_shards import cut_table, join_table


class Targets(NamedTuple):
    """What the last stage needs of a micro-batch, each [batch, seq]."""

    labels: Tensor
    loss_weight: Tensor
    modality: Tensor


class LossSums(NamedTuple):
    """Sums over one process's part of the global batch since the last `take`."""

    loss: float
    text_loss: float
    text_tokens: float
    image_loss: float
    image_tokens: float


class LossReport:
    """Adds up the losses of a step's micro-batches on the device; they are read once per step."""

    def __init__(self) -> None:
        self._sums = torch.zeros(len(LossSums._fields))

    def add(self, loss: Tensor, cross_entropy: Tensor, weight: Tensor, modality: Tensor) -> None:
        """`loss` is a scalar, the others [position]."""
        supervised = weight > 0
        image = (supervised & (modality == 1)).float()
        text = supervised.float() - image
        sums = [loss.detach(), (cross_entropy * text).sum(), text.sum(), (cross_entropy * image).sum(), image.sum()]
        self._sums = self._sums.to(loss.device) + torch.stack(sums)

    def take(self) -> LossSums:
        """The sums, which then begin anew."""
        sums, self._sums = self._sums, torch.zeros_like(self._sums)
        return LossSums(*sums.tolist())


class VocabularyProjection(nn.Module):
    """The head's matrix, not tied to the embedding, and the loss over it: cross-entropy times `loss_weight`, summed.

    Weights sum to 1 over the global batch, so the loss doesn't depend on the layout. DeepSpeed averages the gradients of micro-batches
    and of data-parallel ranks; `averaged_over`, the product of their numbers, undoes that.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        wholes: Iterable[Tensor],
        *,
        averaged_over: int = 1,
        z_loss: float = 0.0,
        report: LossReport | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        """`wholes` are the tables' rows, each [table.size, width], of which this rank keeps its share."""
        super().__init__()
        self.sequence_parallel = sequence_parallel
        self.tables, self.averaged_over, self.z_loss, self.report = tuple(tables), averaged_over, z_loss, report or LossReport()
        self.text, self.visual = (vocabulary_shard(table, whole) for table, whole in zip(tables, wholes, strict=True))
        for rows in (self.text, self.visual):
            # for `sum_in_place`; parameters have no place of their own for what engines should know of them
            rows.has_fp32_gradient = True  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor, targets: Targets) -> Tensor:
        """`hidden` [seq, batch, width], normalised, or this rank's share of it under sequence parallelism. Returns a scalar."""
        labels, weight, modality = (target.t().reshape(-1) for target in targets)
        if self.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden).flatten(0, 1)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden).flatten(0, 1)
        shares = [table_share(table) for table in self.tables]
        group = parallel_state.get_tensor_model_parallel_group()
        loss, cross_entropy = LinearCrossEntropy.apply(hidden, labels, weight, shares, self.z_loss, group, self.text, self.visual)
        self.report.add(loss, cross_entropy, weight, modality)
        return loss * self.averaged_over

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """All logits [seq, batch, id] of what `forward` takes, on every tensor-parallel rank. Collective over them."""
        if self.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden)
        parts = []
        for table, weight in zip(self.tables, (self.text, self.visual), strict=True):
            shares = [torch.empty_like(weight) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
            dist.all_gather(shares, weight.detach().contiguous(), group=parallel_state.get_tensor_model_parallel_group())
            parts.append(hidden @ join_table(shares, table).t())
        return torch.cat(parts, dim=-1)


def table_share(table: Table) -> TableShare:
    """Which ids this rank's rows of `table` stand for."""
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    share = table.padded_size // size
    return TableShare(table.first_id + rank * share, min(max(table.size - rank * share, 0), share))


def vocabulary_shard(table: Table, whole: Tensor) -> nn.Parameter:
    """This rank's rows of `table` from all of them [table.size, width], marked as sharded."""
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    return mark_sharded(nn.Parameter(cut_table(whole, table, rank, size).clone()), 0)


def mark_sharded(weight: nn.Parameter, axis: int) -> nn.Parameter:
    """Tells DeepSpeed that ranks hold different parts of `weight`, so that each part counts in the gradient norm."""
    tensor_parallel.set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=axis, stride=1)
    return weight
