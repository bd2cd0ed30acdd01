"""The norm of a pipeline's gradient, where DeepSpeed's own is wrong or never comes."""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from lavit_dist.engine.skipped_steps import skip_in_fp32


def correct_gradient_norm(engine: Any) -> None:
    """Makes `engine` measure, and clip by, the norm over all of its layout's ranks. Collective."""
    engine.clip_fp32_gradients = types.MethodType(_clip_fp32_gradients, engine)
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer):
        _measure_equally_often(engine.optimizer, engine.device)
    if isinstance(engine.optimizer, BF16_Optimizer):
        _measure_at_least_zero(engine.optimizer, engine.device)


def _measure_equally_often(optimizer: DeepSpeedZeroOptimizer, device: torch.device) -> None:
    """DeepSpeed adds up over ranks once per optimizer group, and waits for ever where stages have unlike numbers of groups.

    They have when parts of the model are frozen, or learn at a rate of their own.
    """
    most = torch.tensor(len(optimizer.bit16_groups), device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    lacking = int(most) - len(optimizer.bit16_groups)
    measure = optimizer.scaled_global_norm

    def over_all_groups(norm_type: int = 2) -> Tensor:
        norms = [measure(norm_type), *(optimizer.get_grad_norm_direct([], []) for _ in range(lacking))]
        return combine_grad_norm_groups(norms, norm_type=norm_type)

    optimizer.scaled_global_norm = over_all_groups


def _measure_at_least_zero(optimizer: BF16_Optimizer, device: torch.device) -> None:
    """DeepSpeed fails on a rank whose parameters all count elsewhere, such as replicated norms where the rest is frozen."""
    counted = optimizer.get_grads_for_norm

    def with_a_zero(for_clipping: bool = False) -> Any:
        if for_clipping:
            return counted(for_clipping=True)
        gradients, experts = counted()
        return [*gradients, torch.zeros(1, device=device)], experts

    optimizer.get_grads_for_norm = with_a_zero


@torch.no_grad()
def _clip_fp32_gradients(engine: Any) -> None:
    """DeepSpeed's own, for fp32 without ZeRO, leaves the norms of later pipeline stages out of the gradient norm.

    Weights that tensor-parallel ranks share out count on each of them, the others on the first alone.
    """
    parameters = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
    first = engine.mpu.get_tensor_model_parallel_rank() == 0
    counted = [p.grad for p in parameters if first or getattr(p, "tensor_model_parallel", False)]
    square = torch.zeros((), device=engine.device)
    for grad in counted:
        square += grad.float().square().sum()
    dist.all_reduce(square, group=engine.mpu.get_model_parallel_group())
    engine._global_grad_norm = square.sqrt()
    skip_in_fp32(engine, parameters, float(engine._global_grad_norm))
    scale = (engine.gradient_clipping() / (engine._global_grad_norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(scale)
