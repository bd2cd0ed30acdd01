"""Muon for the matrices of transformer blocks, AdamW for everything else, as one optimizer that DeepSpeed takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lavit_dist.config.training import OptimizerConfig
from lavit_dist.engine.schedule import parameter_groups

MOMENTUM = 0.95
"""Muon's momentum (Jordan et al. 2024)."""


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon and torch's AdamW behind one interface. Schedules scale both learning rates alike."""

    def __init__(self, module: nn.Module, config: OptimizerConfig) -> None:
        matrices = [parameter for name, parameter in module.named_parameters() if _takes_muon(name, parameter)]
        chosen = {id(parameter) for parameter in matrices}
        rest = [parameter for parameter in module.parameters() if id(parameter) not in chosen]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(parameter_groups(rest, config.weight_decay), config.learning_rate, config.betas, config.eps),
            torch.optim.Muon(
                matrices,
                lr=config.muon_learning_rate,
                weight_decay=config.muon_weight_decay,
                momentum=MOMENTUM,
                adjust_lr_fn="original",
            ),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def _takes_muon(name: str, parameter: nn.Parameter) -> bool:
    """Muon is for hidden matrices: embeddings, heads and input projections stay with AdamW."""
    return parameter.requires_grad and parameter.dim() == 2 and ".blocks." in f".{name}"
