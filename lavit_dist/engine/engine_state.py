"""A DeepSpeed engine's weights, masters, optimizer state and counters, saved so that an engine of any layout goes on from them.

STEP/weights/      see `lavit_dist.checkpoint.weight_parts`
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lavit_dist.checkpoint.llama_state import WEIGHTS_FOLDER
from lavit_dist.checkpoint.weight_parts import WEIGHT, Part, WeightParts, write_index, write_parts
from lavit_dist.config.model import LlamaConfig
from lavit_dist.engine.held_weights import MOMENTS, HeldWeight, held_weights
from lavit_dist.parallel.distributed import barrier, gather_objects, rank
from lavit_dist.parallel.topology import Layout


def save_engine(engine: Any, layout: Layout, step: Path) -> None:
    """Writes what `load_engine` reads. Each number is written by one rank. Collective."""
    folder = step / WEIGHTS_FOLDER
    if rank() == 0:
        folder.mkdir(parents=True)
    barrier()
    mine = list(_parts(engine, layout, f"part-{rank():05d}.safetensors"))
    if mine:
        write_parts(folder, mine[0][0].file, mine)
    every = gather_objects([part for part, _ in mine])
    if rank() == 0:
        write_index(folder, layout.tensor_size, [part for of_rank in every for part in of_rank])


@torch.no_grad()
def load_engine(engine: Any, layout: Layout, step: Path, steps_taken: int, model: LlamaConfig) -> None:
    """Makes the engine what it was after `steps_taken` steps, under whatever layout. Raises `UserError` for what is missing."""
    saved = WeightParts(step / WEIGHTS_FOLDER)
    tensor_rank, size = layout.coordinates(rank()).tensor, layout.tensor_size
    _begin_state(engine)
    for weight in held_weights(engine):
        _fill(weight, WEIGHT, saved.share(weight.name, WEIGHT, model, tensor_rank, size).flatten())
        for kind in weight.moments:
            if saved.has(weight.name, kind):
                _fill(weight, kind, saved.share(weight.name, kind, model, tensor_rank, size).flatten())
            else:  # it was frozen
                weight.moments[kind].zero_()
    _count(engine, steps_taken)


def _parts(engine: Any, layout: Layout, file: str) -> Iterator[tuple[Part, Tensor]]:
    here = layout.coordinates(rank())
    for number, weight in enumerate(held_weights(engine)):
        shared = getattr(weight.parameter, "tensor_model_parallel", False)
        if not shared and here.tensor != 0:
            continue
        part = weight.part if weight.part is not None else weight.whole if not weight.parameter.requires_grad else None
        if part is None or not part.numel():
            continue
        is_whole = weight.whole is not None and part.numel() == weight.whole.numel()
        alike = is_whole and (weight.master is None)  # every data rank has it
        if alike and number % layout.data_size != here.data:
            continue
        shape = tuple(getattr(weight.parameter, "ds_shape", weight.parameter.shape))
        start, stop = weight.start, weight.start + part.numel()
        for kind, tensor in {WEIGHT: part if weight.master is None else weight.master, **weight.moments}.items():
            yield Part(weight.name, kind, shape, here.tensor if shared else 0, start, stop, file), tensor.flatten()


def _fill(weight: HeldWeight, kind: str, share: Tensor) -> None:
    def mine(like: Tensor) -> Tensor:
        return share[weight.start : weight.start + like.numel()]

    if kind == WEIGHT:
        if weight.whole is not None:
            weight.whole.copy_(share)
        if weight.part is not None:
            weight.part.copy_(mine(weight.part))
    state = weight.master if kind == WEIGHT else weight.moments[kind]
    if state is None:
        return
    if hasattr(weight.parameter, "ds_id"):
        _fill_zero_3(weight, kind, mine(state))
    else:
        state.copy_(mine(state))


def _fill_zero_3(weight: HeldWeight, kind: str, values: Tensor) -> None:
    """What ZeRO-3 has on the host may only be set by its own functions, which take the padding too."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    parameter: Any = weight.parameter
    padded = torch.zeros(parameter.ds_tensor.ds_numel, dtype=torch.float32, device=parameter.device)
    padded[: len(values)] = values.to(padded)
    if kind == WEIGHT:
        safe_set_local_fp32_param(parameter, padded)
    else:
        safe_set_local_optimizer_state(parameter, padded, kind)


def _begin_state(engine: Any) -> None:
    """Gives the optimizer the state that it would make in its first step."""
    optimizer = engine.basic_optimizer
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3 has them in the groups only while it steps
    for parameter in flat or [parameter for group in optimizer.param_groups for parameter in group["params"]]:
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state |= {kind: torch.zeros_like(parameter) for kind in MOMENTS}


def _count(engine: Any, steps: int) -> None:
    """Sets all that counts steps, and the learning rates with it."""
    optimizer, scheduler = engine.basic_optimizer, engine.lr_scheduler
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.full_like(state["step"], steps) if isinstance(state["step"], Tensor) else steps
    for group in optimizer.param_groups:
        if "step" in group or type(optimizer).__module__.startswith("apex"):  # apex counts per group
            group["step"] = steps
    scheduler.last_epoch, scheduler._step_count = steps, steps + 1
    rates = [base * factor(steps) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
    engine.global_steps = steps
    engine.micro_steps = steps * engine.gradient_accumulation_steps()
    engine.global_samples = steps * engine.train_batch_size()
