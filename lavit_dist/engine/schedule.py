"""Learning-rate schedules and optimizer groups, as DeepSpeed takes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lavit_dist.config.training import OptimizerConfig


def learning_rate_factor(step: int, *, total_steps: int, optimizer: OptimizerConfig) -> float:
    """The share of the peak learning rate that optimizer step `step` (from 0) uses."""
    if step < optimizer.warmup_steps:
        return (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return 1.0
    floor = optimizer.min_learning_rate / optimizer.learning_rate
    progress = min(1.0, (step - optimizer.warmup_steps) / max(1, total_steps - optimizer.warmup_steps))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def scheduler_factory(optimizer: OptimizerConfig, total_steps: int) -> Callable[[torch.optim.Optimizer], LambdaLR]:
    """What `deepspeed.initialize(lr_scheduler=…)` calls with its optimizer."""
    return lambda wrapped: LambdaLR(wrapped, lambda step: learning_rate_factor(step, total_steps=total_steps, optimizer=optimizer))


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices with weight decay, everything of one dimension without."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.squeeze().dim() > 1]
    vectors = [parameter for parameter in trainable if parameter.squeeze().dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def deepspeed_optimizer(optimizer: OptimizerConfig) -> dict[str, Any]:
    """The `optimizer` section of a DeepSpeed configuration: torch's fused AdamW on the CPU, DeepSpeed's on GPUs."""
    settings: dict[str, Any] = {
        "lr": optimizer.learning_rate,
        "betas": list(optimizer.betas),
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
    }
    if not torch.cuda.is_available():
        settings |= {"torch_adam": True, "fused": True}
    return {"type": "AdamW", "params": settings}
