"""A module under DeepSpeed's plain engine: optimizer, schedule, clipping and ZeRO over data-parallel ranks, saved and restored whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lavit_dist.config.training import OptimizerConfig
from lavit_dist.engine.muon import MuonWithAdamW
from lavit_dist.engine.schedule import deepspeed_optimizer, parameter_groups, scheduler_factory

TAG = "deepspeed"
"""Folder of DeepSpeed's files inside a checkpoint."""


class DataParallelEngine:
    """Takes optimizer steps on `module`'s trainable parameters; call `module` through `self.module`.

    Every rank passes its share of the global batch and the mean loss over it.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        optimizer: OptimizerConfig,
        total_steps: int,
        micro_batch_size: int,
        precision: str = "fp32",
        zero_stage: int = 1,
    ) -> None:
        import deepspeed

        muon = optimizer.name == "muon"
        config = {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": 1,
            # ZeRO keeps flat pieces of parameters, of which Muon can't see that they were matrices.
            "zero_optimization": {"stage": 0 if muon else zero_stage},
            "gradient_clipping": optimizer.gradient_clipping,
            # bf16 matrix products; gradients are still reduced in fp32.
            "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
            "steps_per_print": 10**9,
        }
        if not muon:
            config["optimizer"] = deepspeed_optimizer(optimizer)
        self.module, *_ = deepspeed.initialize(
            model=module,
            model_parameters=parameter_groups(module.parameters(), optimizer.weight_decay),
            optimizer=MuonWithAdamW(module, optimizer) if muon else None,
            lr_scheduler=scheduler_factory(optimizer, total_steps),
            config=config,
        )

    def step(self, loss: Tensor) -> dict[str, float]:
        """Backward, gradient all-reduce, clipping, optimizer, schedule; returns the step's `learning_rate` and `grad_norm`."""
        learning_rate = self.module.get_lr()[0]
        self.module.backward(loss)
        grad_norm = self._grad_norm()
        self.module.step()
        if grad_norm is None:
            grad_norm = self.module.get_global_grad_norm()
        return {"learning_rate": float(learning_rate), "grad_norm": float(grad_norm)}

    def _grad_norm(self) -> float | None:
        """The global norm before clipping, or None under ZeRO, which measures it itself."""
        if self.module.zero_optimization():
            return None
        gradients = [parameter.grad for parameter in self.module.module.parameters() if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def save(self, folder: Path, client_state: dict[str, Any] | None = None) -> None:
        """Writes weights, buffers, optimizer and schedule under `folder`. Collective."""
        self.module.save_checkpoint(str(folder), tag=TAG, client_state=client_state or {}, save_latest=False)

    def load(self, folder: Path) -> dict[str, Any]:
        """Restores what `save` wrote and returns its client state. Collective."""
        _, client_state = self.module.load_checkpoint(str(folder), tag=TAG)
        return client_state
