"""Cross-entropy of a linear layer whose rows, one per id, are shared out over tensor-parallel ranks; logits are never kept.

A few hundred positions at a time are projected, compared with their labels and turned into gradients at once, in the forward pass, so
that the fp32 logits of no whole row of tokens ever exist, and the backward pass has nothing left to multiply but a scalar. (Cut
Cross-Entropy, arXiv 2411.09009, and Liger's kernels do the same on one GPU; here ranks exchange two numbers per position.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_POSITIONS = 1024
"""Positions whose part in the gradient of the rows is added at once: enough to keep a GPU busy."""
CPU_POSITIONS = 256
"""Positions whose logits are fp32 at once on a CPU, where more of them leave its caches. On GPUs they are those of a whole chunk: 200 MB
for LaVIT's 48,386 ids."""


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
        rank's rows alone. Returns a scalar and fp32 [position], of which the second carries no gradient.
        """
        wants_gradient = any(ctx.needs_input_grad)
        learns = ctx.needs_input_grad[-len(tables) :]  # a frozen table needs no gradient of its own
        real = [(table[: share.rows], share) for table, share in zip(tables, shares, strict=True)]
        gradients = [
            torch.zeros_like(table, dtype=torch.float32) if wanted else None for table, wanted in zip(tables, learns, strict=True)
        ]
        hidden_gradient = torch.empty_like(hidden) if wants_gradient else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        cross_entropy = hidden.new_empty(len(hidden), dtype=torch.float32)
        for chunk in _slices(0, len(hidden), CHUNK_POSITIONS):
            count = chunk.stop - chunk.start
            of_logits = [hidden.new_empty(count if wants_gradient else 0, len(rows)) for rows, _ in real]
            for part in _slices(chunk.start, chunk.stop, CPU_POSITIONS if hidden.device.type == "cpu" else CHUNK_POSITIONS):
                logits = [_Logits.of(hidden[part], rows, labels[part], share) for rows, share in real]
                log_partition, target = _over_ranks(logits, group)
                cross_entropy[part] = log_partition - target
                loss += (weight[part] * (cross_entropy[part] + z_loss * log_partition.square())).sum()
                if hidden_gradient is None:
                    continue
                of_probability = weight[part] * (1 + 2 * z_loss * log_partition)
                here = [of[part.start - chunk.start : part.stop - chunk.start] for of in of_logits]
                for of, exact in zip(here, logits, strict=True):
                    of.copy_(exact.gradient(log_partition, of_probability, weight[part]))
                hidden_gradient[part] = sum(of @ rows for of, (rows, _) in zip(here, real, strict=True))
            for gradient, of in zip(gradients, of_logits, strict=True):
                if gradient is not None:
                    gradient[: of.shape[-1]] += of.t() @ hidden[chunk]
        if hidden_gradient is not None:
            ctx.save_for_backward(hidden_gradient, *gradients)
        ctx.mark_non_differentiable(cross_entropy)
        return loss, cross_entropy

    @staticmethod
    def backward(ctx: Any, *of_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, *gradients = ctx.saved_tensors
        scale = of_outputs[0]
        of_tables = (None if gradient is None else gradient.mul_(scale).to(hidden_gradient.dtype) for gradient in gradients)
        return hidden_gradient * scale.to(hidden_gradient.dtype), None, None, None, None, None, *of_tables


def _slices(start: int, stop: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]


class _Logits(NamedTuple):
    """The logits of some positions with a rank's rows of one table, as their exponentials."""

    exponentials: Tensor
    """fp32 [position, row]: exp(logit - largest)."""
    largest: Tensor
    log_partition: Tensor
    target: Tensor
    """The label's logit; 0 where the label is elsewhere."""
    row: Tensor
    """The label's row, clamped into the share."""
    mine: Tensor
    """Whether the label is among these rows."""

    @classmethod
    def of(cls, hidden: Tensor, rows: Tensor, labels: Tensor, share: TableShare) -> _Logits:
        logits = (hidden @ rows.t()).float()
        row = (labels - share.first_id)[:, None]
        mine = (row >= 0) & (row < share.rows)
        if not share.rows:  # this rank's part of the table is padding alone
            nothing = torch.full_like(labels, -torch.inf, dtype=torch.float32)
            return cls(logits, nothing, nothing, torch.zeros_like(nothing), row, mine)
        row = row.clamp(0, share.rows - 1)
        target = logits.gather(-1, row).masked_fill(~mine, 0.0).squeeze(-1)
        largest = logits.amax(-1)
        exponentials = logits.sub_(largest[:, None]).exp_()
        return cls(exponentials, largest, largest + exponentials.sum(-1).log(), target, row, mine)

    def gradient(self, log_partition: Tensor, of_probability: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the logits, in their place: `of_probability` x softmax - `weight` x one-hot of the label."""
        if not self.exponentials.shape[-1]:
            return self.exponentials
        of_logits = self.exponentials.mul_((of_probability * (self.largest - log_partition).exp())[:, None])
        return of_logits.scatter_add_(-1, self.row, (-weight[:, None]).masked_fill(~self.mine, 0.0))


def _over_ranks(logits: list[_Logits], group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The logarithm of the sum of exponentials of all logits, and the label's logit, each fp32 [position]."""
    log_partition = torch.stack([of.log_partition for of in logits]).logsumexp(0)
    target = torch.stack([of.target for of in logits]).sum(0)
    if group is None or dist.get_world_size(group) == 1:
        return log_partition, target
    here = torch.stack([log_partition, target])
    everywhere = here.new_empty(dist.get_world_size(group) * 2, len(target))
    dist.all_gather_into_tensor(everywhere, here, group=group)
    return everywhere[0::2].logsumexp(0), everywhere[1::2].sum(0)
