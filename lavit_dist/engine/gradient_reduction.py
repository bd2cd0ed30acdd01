"""ZeRO-1 with bf16 weights and fp32 gradients, at the least cost in bytes: those sent, and those read and written.

DeepSpeed's optimizer for this case all-reduces every gradient, although a rank updates one part of them: here each data-parallel rank
receives the sum of its own part alone. And it adds each micro-batch's gradient to zeros that it wrote before, by way of a copy in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn

from lavit_dist.parallel.fp32_sums import add_to


def reduce_to_owners(engine: Any) -> None:
    """Makes an engine whose optimizer is `BF16_Optimizer` reduce-scatter its gradients, and sum them in place; leaves others alone."""
    optimizer = engine.optimizer
    if isinstance(optimizer, BF16_Optimizer):
        engine.buffered_allreduce_fallback = lambda **_: _reduce_scatter(optimizer)
        optimizer.mpu = _NormOverAllRanks(optimizer.mpu)
        optimizer.accumulate_hp_grads_and_remove_lp = lambda *of: _sum(optimizer, *of)
        optimizer.clear_hp_grads = lambda: _forget_sums(optimizer)
        for parameter in engine.module.parameters():
            if getattr(parameter, "has_fp32_gradient", False):
                parameter.grad_dtype = torch.float32  # or it would be rounded to bf16 on its way to its sum


@torch.no_grad()
def _sum(optimizer: BF16_Optimizer, parameter: nn.Parameter, group: int, index: int) -> None:
    """Moves a gradient into its fp32 sum: DeepSpeed calls it when the backward pass has made one."""
    gradient, parameter.grad = parameter.grad, None
    if gradient is None:
        return
    total, begun = optimizer.fp32_groups_gradients[group][index], optimizer.fp32_groups_has_gradients[group]
    if begun[index]:
        add_to(total, gradient.view_as(total))
    else:
        total.copy_(gradient.view_as(total))
    begun[index] = True


def _forget_sums(optimizer: BF16_Optimizer) -> None:
    """The next gradient begins each sum anew; one that gets none by the end of its step is set to zero then."""
    for begun in optimizer.fp32_groups_has_gradients:
        begun[:] = [False] * len(begun)


def _stale_sums(optimizer: BF16_Optimizer) -> Iterator[Tensor]:
    for totals, begun in zip(optimizer.fp32_groups_gradients, optimizer.fp32_groups_has_gradients, strict=True):
        yield from (total for total, is_begun in zip(totals, begun, strict=True) if not is_begun)


@torch.no_grad()
def _reduce_scatter(optimizer: BF16_Optimizer) -> None:
    """Averages this rank's part over its data-parallel peers and clears the others, so that all ranks' norms add up."""
    for total in _stale_sums(optimizer):
        total.zero_()
    parts = zip(
        optimizer.fp32_groups_gradients_flat,
        optimizer.fp32_groups_gradient_flat_partition,
        optimizer.real_dp_process_group,
        strict=True,
    )
    for gradients, mine, group in parts:
        if dist.get_world_size(group) > 1:
            gradients.div_(dist.get_world_size(group))
            summed = torch.empty_like(mine)
            dist.reduce_scatter_tensor(summed, gradients, group=group)
            gradients.zero_()
            mine.copy_(summed)


class _NormOverAllRanks:
    """A model-parallel unit whose gradient norm is summed over data-parallel ranks, too."""

    def __init__(self, mpu: Any) -> None:
        self._mpu = mpu

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mpu, name)

    @staticmethod
    def get_model_parallel_group() -> Any:
        return dist.group.WORLD
