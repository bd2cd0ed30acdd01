"""Optimizer steps whose gradient isn't finite: none is taken, on any rank, and the schedule goes on.

DeepSpeed's ZeRO optimizers and its bf16 one see such a gradient by its norm over all ranks and leave their weights alone; without ZeRO it
would go into the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn


def skip_in_fp32(engine: Any, parameters: Iterable[nn.Parameter], norm: float) -> None:
    """Before the optimizer's step of an engine without ZeRO: takes away gradients whose `norm`, that of all ranks, isn't finite."""
    engine.optimizer.overflow = not math.isfinite(norm)  # what DeepSpeed's own optimizers tell the engine by
    if engine.optimizer.overflow:
        for parameter in parameters:
            parameter.grad = None


def keep_schedule(engine: Any) -> None:
    """After a step: moves the schedule on where DeepSpeed didn't, since learning rates follow the number of steps, not of updates."""
    if getattr(engine.optimizer, "overflow", False):
        engine.lr_scheduler.step()
