"""A module under DeepSpeed's plain engine: AdamW, schedule, clipping and ZeRO over data-parallel ranks, saved and restored whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lavit_dist.config.training import OptimizerConfig
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
        zero_stage: int = 0,
    ) -> None:
        import deepspeed

        self.module, *_ = deepspeed.initialize(
            model=module,
            model_parameters=parameter_groups(module.parameters(), optimizer.weight_decay),
            lr_scheduler=scheduler_factory(optimizer, total_steps),
            config={
                "train_micro_batch_size_per_gpu": micro_batch_size,
                "gradient_accumulation_steps": 1,
                "optimizer": deepspeed_optimizer(optimizer),
                "zero_optimization": {"stage": zero_stage},
                "gradient_clipping": optimizer.gradient_clipping,
                "steps_per_print": 10**9,
            },
        )

    def step(self, loss: Tensor) -> dict[str, float]:
        """Backward, gradient all-reduce, clipping, AdamW, schedule; returns the step's `learning_rate` and `grad_norm`."""
        learning_rate = self.module.get_lr()[0]
        self.module.backward(loss)
        self.module.step()
        return {"learning_rate": float(learning_rate), "grad_norm": float(self.module.get_global_grad_norm() or 0.0)}

    def save(self, folder: Path, client_state: dict[str, Any] | None = None) -> None:
        """Writes weights, buffers, optimizer and schedule under `folder`. Collective."""
        self.module.save_checkpoint(str(folder), tag=TAG, client_state=client_state or {}, save_latest=False)

    def load(self, folder: Path) -> dict[str, Any]:
        """Restores what `save` wrote and returns its client state. Collective."""
        _, client_state = self.module.load_checkpoint(str(folder), tag=TAG)
        return client_state
