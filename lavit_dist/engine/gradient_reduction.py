"""ZeRO-1 with bf16 weights and fp32 gradients: each data-parallel rank receives the sum of its own part alone.

DeepSpeed's optimizer for this case all-reduces every gradient, although a rank updates one part of them: twice the bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer


def reduce_to_owners(engine: Any) -> None:
    """Makes an engine whose optimizer is `BF16_Optimizer` reduce-scatter its gradients; leaves other engines alone."""
    optimizer = engine.optimizer
    if isinstance(optimizer, BF16_Optimizer):
        engine.buffered_allreduce_fallback = lambda **_: _reduce_scatter(optimizer)
        optimizer.mpu = _NormOverAllRanks(optimizer.mpu)


@torch.no_grad()
def _reduce_scatter(optimizer: BF16_Optimizer) -> None:
    """Averages this rank's part over its data-parallel peers and clears the others, so that all ranks' norms add up."""
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
