"""The moving average of a module's weights, which is often better than the weights themselves."""

from __future__ import annotations

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import nn

WARMUP = 10.0
"""Steps after which the average starts to forget its beginning slowly, as in diffusers' EMAModel."""
Module = TypeVar("Module", bound=nn.Module)


class AveragedWeights(Generic[Module]):
    """A frozen copy of `module` whose parameters follow a moving average; buffers, and parameters that no gradient moves, are copied.

    With a `decay` of 0 there is no copy, and `product` is the module itself.
    """

    def __init__(self, module: Module, decay: float) -> None:
        self.module = module
        self.decay = decay
        self.averaged = copy.deepcopy(module).requires_grad_(False) if decay else None

    @property
    def product(self) -> Module:
        """What to publish."""
        return self.module if self.averaged is None else self.averaged

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after optimizer step `step` (from 0)."""
        if self.averaged is None:
            return
        decay = min(self.decay, (1 + step) / (WARMUP + step))
        pairs = list(zip(self.averaged.parameters(), self.module.parameters(), strict=True))
        moving = [(mean, value.detach()) for mean, value in pairs if value.requires_grad]
        if moving:
            torch._foreach_lerp_([mean for mean, _ in moving], [value for _, value in moving], 1 - decay)
        for mean, value in pairs:
            if not value.requires_grad:
                mean.copy_(value)
        for mean_buffer, buffer in zip(self.averaged.buffers(), self.module.buffers(), strict=True):
            mean_buffer.copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        """The average, or nothing where there is none."""
        return {} if self.averaged is None else self.averaged.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        if self.averaged is not None:
            self.averaged.load_state_dict(state)
