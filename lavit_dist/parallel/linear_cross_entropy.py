"""Cross-entropy of a linear layer whose rows, one per id, are shared out over tensor-parallel ranks; logits are never kept.

A thousand positions at a time are projected, compared with their labels and turned into gradients at once, in the forward pass, so that
the logits of no whole row of tokens ever exist, and the backward pass has nothing left to multiply but a scalar. (Cut Cross-Entropy,
arXiv 2411.09009, and Liger's kernels do the same on one GPU; here ranks exchange two numbers per position.) Logits become fp32 for as
long as they are looked at, once, and their exponentials take their place, which are their gradients but for the label's and a factor per
position: buffers are made once per call. What is kept from the forward to the backward pass are gradients alone: one in fp32 per table,
and that of the hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lavit_dist.parallel.fp32_sums import add_to

CHUNK_POSITIONS = 1024
"""Positions whose logits exist at once, in the precision of the weights: enough to keep a GPU busy; 100 MB in bf16 for LaVIT's 48,386 ids."""
CPU_POSITIONS = 8
"""Positions whose logits are fp32 at once on a CPU, where they stay in its caches. On GPUs they are those of a whole chunk, 130 MB for 32,000 ids of text."""

EPSILON = 2**-24
"""Stands for a factor of 0, by which nothing can be divided; fp32 doesn't tell it from 0 beside 1."""


class TableShare(NamedTuple):
    """Which ids a rank's rows of a table stand for."""

    first_id: int
    rows: int
    """Rows that mean something; those after them are padding."""


class LinearCrossEntropy(torch.autograd.Function):
    """Sum over positions of weight x (cross-entropy + z_loss x log_partition^2), and each position's cross-entropy."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        weight: Tensor,
        shares: Sequence[TableShare],
        z_loss: float,
        group: dist.ProcessGroup | None,
        *tables: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """`hidden` [position, width]; `labels` int64 and `weight` fp32 [position]; `tables` [row, width], one per entry of `shares`.

        `group` are the ranks that hold the other rows; every one passes the same positions. Gradients of `hidden` are those of this
        rank's rows alone; those of tables are fp32, which autograd rounds to their dtype unless their `grad_dtype` says otherwise. `hidden` and
        `tables` are of one dtype, whatever autocast says. Returns a scalar and fp32 [position], of which the second carries no gradient.
        """
        learns = ctx.needs_input_grad[-len(tables) :]  # a frozen table needs no gradient of its own
        real = [(table[: share.rows], share) for table, share in zip(tables, shares, strict=True)]
        gradients = [
            _unset_gradient(table, share, len(hidden)) if wanted else None
            for table, share, wanted in zip(tables, shares, learns, strict=True)
        ]
        hidden_gradient = torch.empty_like(hidden)
        loss = hidden.new_zeros((), dtype=torch.float32)
        cross_entropy = hidden.new_empty(len(hidden), dtype=torch.float32)
        chunk_size = min(CHUNK_POSITIONS, len(hidden))
        exact = _Exact(min(chunk_size, CPU_POSITIONS) if hidden.device.type == "cpu" else chunk_size, real)
        projected = [hidden.new_empty(chunk_size, len(rows)) for rows, _ in real]
        for chunk in _slices(len(hidden), CHUNK_POSITIONS):
            inputs = hidden[chunk]
            here = [of[: len(inputs)] for of in projected]
            for logits, (rows, _) in zip(here, real, strict=True):
                torch.mm(inputs, rows.t(), out=logits)
            targets = [_Targets.of(labels[chunk], share) for _, share in real]
            of_labels = [target.logit(logits) for target, logits in zip(targets, here, strict=True)]
            largest, log_partitions = zip(*map(exact.exponentiate, here), strict=True)
            log_partition, of_label = _over_ranks(log_partitions, of_labels, group)
            cross_entropy[chunk] = log_partition - of_label
            loss += (weight[chunk] * (cross_entropy[chunk] + z_loss * log_partition.square())).sum()
            of_inputs = []
            for relative, most, target, (rows, _), gradient in zip(here, largest, targets, real, gradients, strict=True):
                scale = weight[chunk] * _to_gradient(relative, most, target, log_partition, of_label, z_loss)
                of_inputs.append((relative @ rows) * scale[:, None])
                if gradient is not None:
                    product = relative.t() @ (inputs * scale[:, None]).to(inputs.dtype)
                    if chunk.start == 0:
                        gradient[: len(rows)] = product
                    else:
                        add_to(gradient[: len(rows)], product)
            hidden_gradient[chunk] = sum(of_inputs)
        ctx.save_for_backward(hidden_gradient, *gradients)
        ctx.mark_non_differentiable(cross_entropy)
        return loss, cross_entropy

    @staticmethod
    def backward(ctx: Any, *of_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, *gradients = ctx.saved_tensors
        scale = of_outputs[0]
        of_tables = (None if gradient is None else gradient.mul_(scale) for gradient in gradients)
        return hidden_gradient * scale, None, None, None, None, None, *of_tables


def _unset_gradient(table: Tensor, share: TableShare, positions: int) -> Tensor:
    """fp32 like `table`; padding has none, and the first positions, if there are any, set the rest."""
    gradient = torch.empty_like(table, dtype=torch.float32)
    gradient[share.rows if positions else 0 :] = 0
    return gradient


def _slices(stop: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, stop)) for first in range(0, stop, step)]


class _Targets(NamedTuple):
    """The labels of some positions, as rows of a rank's share of a table."""

    row: Tensor
    """[position, 1], clamped into the share."""
    mine: Tensor
    """[position, 1]: whether the label is among these rows."""

    @classmethod
    def of(cls, labels: Tensor, share: TableShare) -> _Targets:
        row = (labels - share.first_id)[:, None]
        return cls(row.clamp(0, max(share.rows - 1, 0)), (row >= 0) & (row < share.rows))

    def logit(self, logits: Tensor) -> Tensor:
        """fp32 [position]; 0 where the label is elsewhere."""
        if not logits.shape[-1]:  # this rank's part of the table is padding alone
            return logits.new_zeros(len(logits), dtype=torch.float32)
        return logits.gather(-1, self.row).float().masked_fill(~self.mine, 0.0).squeeze(-1)


class _Exact:
    """A buffer in which the logits of a few positions are looked at in fp32, one table after the other."""

    def __init__(self, positions: int, tables: Sequence[tuple[Tensor, TableShare]]) -> None:
        (first, _), *_ = tables
        self.positions = positions
        self.buffer = first.new_empty(positions * max(len(rows) for rows, _ in tables), dtype=torch.float32)

    def exponentiate(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Puts exp(logit - largest) in the place of `logits` [position, row].

        Returns, each fp32 [position], the largest logit and the logarithm of the sum of all exponentials.
        """
        largest = logits.new_full((len(logits),), -torch.inf, dtype=torch.float32)
        log_partition = largest.clone()
        if not logits.shape[-1]:
            return largest, log_partition
        for part in _slices(len(logits), self.positions):
            few = logits[part]
            exact = self.buffer[: few.numel()].view_as(few).copy_(few)
            torch.amax(exact, -1, out=largest[part])
            torch.sum(exact.sub_(largest[part, None]).exp_(), -1, out=log_partition[part])
            few.copy_(exact)
        return largest, log_partition.log_().add_(largest)


def _to_gradient(
    relative: Tensor, largest: Tensor, target: _Targets, log_partition: Tensor, of_label: Tensor, z_loss: float
) -> Tensor:
    """Makes exponentials `relative` [position, row] to the `largest` logit of each position the gradient of (cross-entropy + z_loss x
    log_partition^2), but for a factor per position: returns these, fp32 [position].

    Only the label's entry is touched: it is divided by the factor. Lest the quotient overflow where a rank's logits lie far below others', the
    probability of its largest is taken for e^-40 at least, which is nothing beside the label's 1.
    """
    of_partition = 2 * z_loss * log_partition
    at_all = (1 + of_partition).where(of_partition != -1, EPSILON)
    factor = at_all * (largest - log_partition).clamp(min=-40).exp()
    if relative.shape[-1]:
        margin = of_label - log_partition
        of_target = (margin.expm1() + of_partition * margin.exp()) / factor  # expm1: exact where the label is all but certain
        others = relative.gather(-1, target.row)
        entry = torch.where(target.mine, of_target[:, None].to(relative.dtype), others).squeeze(-1)
        positions = torch.arange(len(relative), device=relative.device)
        relative.index_put_((positions, target.row.squeeze(-1)), entry)  # on CPUs scatter_ copies all of a bf16 tensor
    return factor


def _over_ranks(
    log_partitions: tuple[Tensor, ...], of_labels: list[Tensor], group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The logarithm of the sum of exponentials of all logits, and the label's logit, each fp32 [position]."""
    log_partition, of_label = torch.stack(log_partitions).logsumexp(0), torch.stack(of_labels).sum(0)
    if group is None or dist.get_world_size(group) == 1:
        return log_partition, of_label
    here = torch.stack([log_partition, of_label])
    everywhere = here.new_empty(dist.get_world_size(group) * 2, len(of_label))
    dist.all_gather_into_tensor(everywhere, here, group=group)
    return everywhere[0::2].logsumexp(0), everywhere[1::2].sum(0)
