"""A module under DeepSpeed's plain engine: optimizer, schedule, clipping and ZeRO over data-parallel ranks, saved and restored whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lavit_dist.checkpoint.snapshot import Snapshot
from lavit_dist.config.training import OptimizerConfig
from lavit_dist.engine.adamw import apex_adamw, deepspeed_optimizer
from lavit_dist.engine.engine_state import engine_snapshot, load_engine
from lavit_dist.engine.muon import MuonWithAdamW
from lavit_dist.engine.schedule import parameter_groups, scheduler_factory
from lavit_dist.engine.skipped_steps import keep_schedule, skip_in_fp32
from lavit_dist.errors import check
from lavit_dist.files import read_json
from lavit_dist.parallel.distributed import rank, world_size
from lavit_dist.parallel.topology import Layout

TENSORS, FACTS = "state.safetensors", "state.json"
"""Buffers and what else a training needs to go on, inside a checkpoint."""
BUFFER = "buffer."


class DataParallelEngine:
    """Takes optimizer steps on `module`'s trainable parameters; call `module` through `self.module`.

    Every rank passes the mean loss over each of its micro-batches of a step, all of one size, to `backward`, and then calls `step`.
    `learning_rate_scales` are factors of single parameters' learning rates.
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
        accumulation_steps: int = 1,
        learning_rate_scales: Mapping[nn.Parameter, float] | None = None,
    ) -> None:
        import deepspeed

        muon = optimizer.name == "muon"
        config = {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": accumulation_steps,
            # ZeRO keeps flat pieces of parameters, of which Muon can't see that they were matrices.
            "zero_optimization": {"stage": 0 if muon else zero_stage},
            # Without ZeRO the norm is measured where it is clipped by: always, so that one that isn't finite is seen.
            "gradient_clipping": optimizer.gradient_clipping or (0.0 if zero_stage and not muon else math.inf),
            # bf16 matrix products; gradients are still reduced in fp32.
            "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
            "steps_per_print": 10**9,
        }
        if not muon:
            config["optimizer"] = deepspeed_optimizer(optimizer)
        self.module, *_ = deepspeed.initialize(
            model=module,
            model_parameters=parameter_groups(module.parameters(), optimizer, learning_rate_scales),
            optimizer=MuonWithAdamW(module, optimizer, learning_rate_scales) if muon else apex_adamw(optimizer),
            lr_scheduler=scheduler_factory(optimizer, total_steps),
            config=config,
        )
        self.module.clip_fp32_gradients = self._clip

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of one micro-batch's mean loss; the last of a step also averages gradients over the ranks."""
        self.module.backward(loss)
        if not self.module.is_gradient_accumulation_boundary():
            self.module.step()  # only counts the micro-batch

    def step(self) -> dict[str, float]:
        """Clipping, optimizer, schedule; returns the step's `learning_rate` and `grad_norm`. One that isn't finite moves nothing."""
        learning_rate = self.module.get_lr()[0]
        self.module.step()
        keep_schedule(self.module)
        return {"learning_rate": float(learning_rate), "grad_norm": float(self.module.get_global_grad_norm())}

    def _clip(self) -> None:
        """What DeepSpeed calls before a step without ZeRO; its own form of it can't skip one."""
        parameters = [parameter for parameter in self.module.module.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        self.module._global_grad_norm = norm
        skip_in_fp32(self.module, parameters, float(norm))
        if norm.isfinite():
            torch.nn.utils.clip_grads_with_norm_(parameters, self.module.gradient_clipping(), norm)

    @property
    def steps(self) -> int:
        """How many steps this engine has taken, skipped ones too."""
        return int(self.module.global_steps)

    def close(self) -> None:
        """Lets go of the module, which another engine may then take."""
        self.module.destroy()

    def snapshot(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Snapshot:
        """Weights, buffers, optimizer and schedule, and beside them what the training gives, alike on all ranks. Collective."""
        engine = engine_snapshot(self.module, self._layout)
        if rank() != 0:
            return engine
        buffers = {BUFFER + name: buffer for name, buffer in self._buffers().items()}
        return engine | Snapshot({TENSORS: {**buffers, **tensors}}, {FACTS: dict(facts)})

    @torch.no_grad()
    def load(self, folder: Path, facts_wanted: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Restores the engine from what any number of ranks wrote, and returns what the training gave beside it.

        Raises `UserError` for what is missing, of `facts_wanted`, too.
        """
        check(
            (folder / TENSORS).exists() and (folder / FACTS).exists(),
            f"{folder} is no checkpoint of this kind of training: {TENSORS} or {FACTS} is missing; name another run_dir.",
        )
        tensors, facts = load_file(folder / TENSORS), read_json(folder / FACTS, "resume from an earlier step", facts_wanted)
        load_engine(self.module, self._layout, folder, None)
        for name, buffer in self._buffers().items():
            check(BUFFER + name in tensors, f"{folder / TENSORS} lacks the buffer {name}; give a step of a run with this model.")
            buffer.copy_(tensors.pop(BUFFER + name))
        return tensors, facts

    @property
    def _layout(self) -> Layout:
        return Layout(tensor_size=1, pipe_size=1, data_size=world_size())

    def _buffers(self) -> dict[str, Tensor]:
        module = self.module.module
        kept = module.state_dict().keys()
        return {name: buffer for name, buffer in module.named_buffers() if name in kept}
