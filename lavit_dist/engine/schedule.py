"""Learning-rate schedules and optimizer groups, as DeepSpeed takes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
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
    first = optimizer.decay_start(total_steps)
    progress = min(1.0, max(0, step - first) / max(1, total_steps - first))
    if optimizer.schedule == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        height = 1 - (math.sqrt(progress) if optimizer.decay_shape == "1-sqrt" else progress)
    floor = optimizer.min_learning_rate / optimizer.learning_rate
    return floor + (1 - floor) * height


def scheduler_factory(optimizer: OptimizerConfig, total_steps: int) -> Callable[[torch.optim.Optimizer], LambdaLR]:
    """What `deepspeed.initialize(lr_scheduler=…)` calls with its optimizer."""
    return lambda wrapped: LambdaLR(wrapped, lambda step: learning_rate_factor(step, total_steps=total_steps, optimizer=optimizer))


def parameter_groups(
    parameters: Iterable[nn.Parameter],
    optimizer: OptimizerConfig,
    scales: Mapping[nn.Parameter, float] | None = None,
    without_decay: Collection[nn.Parameter] = (),
) -> list[dict[str, Any]]:
    """Trainable parameters in groups: matrices with weight decay, everything of one dimension without, apart by learning rate.

    `scales` are factors of the learning rate; a parameter without one has 1. `without_decay` are matrices that don't decay.
    """
    exempt = {id(parameter) for parameter in without_decay}
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # of a weight that ZeRO-3 has cut, too
            decays = sum(size > 1 for size in shape) > 1 and id(parameter) not in exempt
            groups.setdefault((decays, (scales or {}).get(parameter, 1.0)), []).append(parameter)
    return [
        {"params": group, "weight_decay": optimizer.weight_decay if decays else 0.0, "lr": scale * optimizer.learning_rate}
        for (decays, scale), group in sorted(groups.items(), reverse=True, key=lambda item: item[0])
    ]
