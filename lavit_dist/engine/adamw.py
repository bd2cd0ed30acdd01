"""Which AdamW runs, as DeepSpeed takes it. All three update in fp32, and none is run by a rank for more than its ZeRO share.

torch's fused AdamW is one kernel that comes compiled, on CPUs as on GPUs; DeepSpeed takes it by `torch_adam`, also for an optimizer
that ZeRO offloads to the CPU. DeepSpeed's own FusedAdam and CPUAdam are compiled at their first use, which takes a compiler on every
node. apex's FusedAdam, which launches one kernel for many weights, is made here and handed to DeepSpeed, whose ZeRO knows its class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lavit_dist.config.training import OptimizerConfig
from lavit_dist.errors import check
from lavit_dist.parallel.apex import has_apex_kernels

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's averages, by the name that torch, apex and DeepSpeed give them."""
APEX_KERNELS = "amp_C"
"""apex's extension with the kernel of its FusedAdam."""


def adamw_implementation(optimizer: OptimizerConfig, *, zero_stage: int = 0, offloaded: bool = False) -> str:
    """`torch`, `apex` or `deepspeed`; raises `UserError` for apex's where it can't run. `offloaded`: ZeRO keeps the state on the CPU.

    Under ZeRO-3 parts of a group are updated one after the other, each of which apex's would count as an update of the whole.
    """
    usable = torch.cuda.is_available() and not offloaded and zero_stage < 3 and has_apex_kernels(APEX_KERNELS)
    if optimizer.implementation == "auto":
        return "apex" if usable else "torch"
    check(
        optimizer.implementation != "apex" or usable,
        "optimizer.implementation apex needs a GPU, optimizer state that isn't offloaded, a parallel.zero_stage of at most 2, and NVIDIA's"
        " apex built with its CUDA extensions (https://github.com/NVIDIA/apex); choose torch, or auto.",
    )
    return optimizer.implementation


def deepspeed_optimizer(optimizer: OptimizerConfig, *, zero_stage: int = 0, offloaded: bool = False) -> dict[str, Any]:
    """The `optimizer` section of a DeepSpeed configuration, of which `apex_adamw` takes the place where there is one."""
    settings = _settings(optimizer) | {"betas": list(optimizer.betas)}
    if adamw_implementation(optimizer, zero_stage=zero_stage, offloaded=offloaded) != "deepspeed":
        settings |= {"torch_adam": True, "fused": True}
    return {"type": "AdamW", "params": settings}


def apex_adamw(
    optimizer: OptimizerConfig, *, zero_stage: int = 0, offloaded: bool = False
) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None:
    """What makes apex's FusedAdam of parameter groups, for `deepspeed.initialize(optimizer=…)`; None where another one is to run."""
    if adamw_implementation(optimizer, zero_stage=zero_stage, offloaded=offloaded) != "apex":
        return None
    from apex.optimizers import FusedAdam

    return lambda groups: FusedAdam(groups, adam_w_mode=True, **_settings(optimizer))


def counts_per_group(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it updates a group's weights by one kernel, with one count of updates: apex's FusedAdam and DeepSpeed's do."""
    return type(optimizer).__name__ == "FusedAdam"


def begin_adam(state: dict[str, Any], parameter: torch.Tensor) -> None:
    """Fills the state that Adam would make for `parameter` in its first step, where there is none."""
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state |= {kind: torch.zeros_like(parameter) for kind in MOMENTS}


def _settings(optimizer: OptimizerConfig) -> dict[str, Any]:
    return {
        "lr": optimizer.learning_rate,
        "betas": optimizer.betas,
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
    }
