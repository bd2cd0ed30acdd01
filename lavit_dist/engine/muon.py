"""Muon for the hidden matrices and convolutions of a network, AdamW for everything else, as one optimizer that DeepSpeed takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lavit_dist.config.training import OptimizerConfig
from lavit_dist.engine.adamw import begin_adam
from lavit_dist.engine.schedule import parameter_groups

MOMENTUM = 0.95
"""Muon's momentum (Jordan et al. 2024)."""
MOMENTUM_BUFFER = "momentum_buffer"
"""What torch's Muon calls its average."""


HIDDEN = re.compile(r"(^|\.)(\w*blocks|mid_block)\.")
"""Names of the weights inside transformer blocks and those of a diffusers U-Net."""


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon and torch's AdamW behind one interface. Schedules scale both learning rates alike.

    A kernel [out, in, height, width] is moved as the matrix [out, in x height x width].
    """

    def __init__(self, module: nn.Module, config: OptimizerConfig, scales: Mapping[nn.Parameter, float] | None = None) -> None:
        hidden = [parameter for name, parameter in module.named_parameters() if _takes_muon(name, parameter)]
        chosen = {id(parameter) for parameter in hidden}
        rest = [parameter for parameter in module.parameters() if id(parameter) not in chosen]
        self.kernels = [(kernel, nn.Parameter(kernel.detach().flatten(1))) for kernel in hidden if kernel.dim() > 2]
        """Kernels, and the same memory as matrices."""
        matrices: dict[float, list[nn.Parameter]] = {}
        for parameter, matrix in [(matrix, matrix) for matrix in hidden if matrix.dim() == 2] + self.kernels:
            matrices.setdefault((scales or {}).get(parameter, 1.0), []).append(matrix)
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(parameter_groups(rest, config, scales), config.learning_rate, config.betas, config.eps, fused=True),
            torch.optim.Muon(
                [{"params": group, "lr": scale * config.muon_learning_rate} for scale, group in matrices.items()],
                lr=config.muon_learning_rate,
                weight_decay=config.muon_weight_decay,
                momentum=MOMENTUM,
                adjust_lr_fn="original",
            ),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for kernel, matrix in self.kernels:
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        for part in self.parts:
            part.step()

    def states(self) -> dict[torch.Tensor, dict[str, Any]]:
        """The state of every parameter that either part moves; a kernel's is that of its matrix."""
        kernels = {id(matrix): kernel for kernel, matrix in self.kernels}
        return {kernels.get(id(parameter), parameter): state for part in self.parts for parameter, state in part.state.items()}

    def begin(self) -> None:
        """Gives both parts the state that they would make in their first step, where they have none."""
        adam, muon = self.parts
        for part in self.parts:
            for parameter in [parameter for group in part.param_groups for parameter in group["params"]]:
                state = part.state[parameter]
                if not state and part is muon:
                    state[MOMENTUM_BUFFER] = torch.zeros_like(parameter)
                elif part is adam:
                    begin_adam(state, parameter)


def _takes_muon(name: str, parameter: nn.Parameter) -> bool:
    """Muon is for hidden weights: embeddings, heads and the first and last layers stay with AdamW."""
    return parameter.requires_grad and parameter.dim() >= 2 and HIDDEN.search(name) is not None
