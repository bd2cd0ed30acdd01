"""fp32 sums of bf16 gradients over micro-batches, with fewer passes over memory than DeepSpeed's.

Its optimizer for ZeRO-1 writes zeros to every sum at the end of a step, and adds each gradient to it by way of a copy in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import nn

from lavit_dist.parallel.fp32_sums import add_to


def sum_in_place(engine: Any) -> None:
    """Makes an engine whose optimizer is `BF16_Optimizer` begin each sum by a step's first gradient; leaves other engines alone.

    Parameters that are marked by `has_fp32_gradient` keep the fp32 of a gradient that is made in it, which autograd would round to their
    own precision. Weights tied across pipeline stages, for which DeepSpeed marks parameters by their sums, aren't provided for.
    """
    optimizer = engine.optimizer
    if not isinstance(optimizer, BF16_Optimizer):
        return
    reduce = engine.buffered_allreduce_fallback

    def reduce_what_is_summed(**named: Any) -> None:
        _clear_stale(optimizer)
        reduce(**named)

    engine.buffered_allreduce_fallback = reduce_what_is_summed
    optimizer.accumulate_hp_grads_and_remove_lp = lambda *of: _sum(optimizer, *of)
    optimizer.clear_hp_grads = lambda: _forget(optimizer)
    for parameter in engine.module.parameters():
        if getattr(parameter, "has_fp32_gradient", False):
            parameter.grad_dtype = torch.float32


@torch.no_grad()
def _sum(optimizer: BF16_Optimizer, parameter: nn.Parameter, group: int, index: int) -> None:
    """Moves a gradient into its sum: DeepSpeed calls it when the backward pass has made one."""
    gradient, parameter.grad = parameter.grad, None
    if gradient is None:
        return
    total, begun = optimizer.fp32_groups_gradients[group][index], optimizer.fp32_groups_has_gradients[group]
    if begun[index]:
        add_to(total, gradient.view_as(total))
    else:
        total.copy_(gradient.view_as(total))
    begun[index] = True


def _forget(optimizer: BF16_Optimizer) -> None:
    """Leaves the numbers where they are: the next gradient takes their place."""
    for begun in optimizer.fp32_groups_has_gradients:
        begun[:] = [False] * len(begun)


def _clear_stale(optimizer: BF16_Optimizer) -> None:
    """At a step's end: what got no gradient in it still has the sum of an earlier one."""
    for totals, begun in zip(optimizer.fp32_groups_gradients, optimizer.fp32_groups_has_gradients, strict=True):
        for total, is_begun in zip(totals, begun, strict=True):
            if not is_begun:
                total.zero_()
