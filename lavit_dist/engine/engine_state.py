"""A DeepSpeed engine's weights, masters, optimizer state and counters, saved so that an engine of any layout goes on from them.

STEP/weights/      see `lavit_dist.checkpoint.weight_parts`
STEP/engine.json   how many steps were taken, and how many of them moved the weights
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lavit_dist.checkpoint.llama_state import WEIGHTS_FOLDER
from lavit_dist.checkpoint.snapshot import Snapshot
from lavit_dist.checkpoint.weight_parts import INDEX, WEIGHT, Part, WeightParts, index_of
from lavit_dist.config.model import LlamaConfig
from lavit_dist.engine.adamw import counts_per_group
from lavit_dist.engine.held_weights import HeldWeight, begin_state, held_weights, optimizer_states, optimizer_steps
from lavit_dist.files import read_json
from lavit_dist.parallel.distributed import gather_objects, rank
from lavit_dist.parallel.topology import Layout

ENGINE = "engine.json"


def engine_snapshot(engine: Any, layout: Layout) -> Snapshot:
    """What `load_engine` reads. Each number is in one rank's snapshot. Collective."""
    file = f"part-{rank():05d}.safetensors"
    mine = list(_parts(engine, layout, file))
    every = gather_objects([part for part, _ in mine])
    tensors = {f"{WEIGHTS_FOLDER}/{file}": {part.key: tensor.detach() for part, tensor in mine}} if mine else {}
    if rank() != 0:
        return Snapshot(tensors)
    updates = max(optimizer_steps(engine), default=engine.global_steps)
    index = index_of(layout.tensor_size, [part for of_rank in every for part in of_rank])
    return Snapshot(tensors, {f"{WEIGHTS_FOLDER}/{INDEX}": index, ENGINE: {"steps": engine.global_steps, "updates": updates}})


@torch.no_grad()
def load_engine(engine: Any, layout: Layout, step: Path, model: LlamaConfig | None) -> None:
    """Makes the engine what it was, under whatever layout. Raises `UserError` for what is missing.

    `model` says how tensor-parallel ranks share out the weights; None where they never do.
    """
    saved = WeightParts(step / WEIGHTS_FOLDER)
    counted = read_json(step / ENGINE, "give another step folder", ("steps", "updates"))
    tensor_rank, size = layout.coordinates(rank()).tensor, layout.tensor_size
    begin_state(engine)
    for weight in held_weights(engine):
        _fill(weight, WEIGHT, saved.share(weight.name, WEIGHT, model, tensor_rank, size).flatten())
        for kind in weight.moments:
            if saved.has(weight.name, kind):
                _fill(weight, kind, saved.share(weight.name, kind, model, tensor_rank, size).flatten())
            else:  # it was frozen
                weight.moments[kind].zero_()
    _count(engine, counted["steps"], counted["updates"])


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


def _count(engine: Any, steps: int, updates: int) -> None:
    """Sets all that counts: the learning rates by the steps, the optimizer's corrections by those that weren't skipped."""
    optimizer, scheduler = engine.basic_optimizer, engine.lr_scheduler
    for state in optimizer_states(engine).values():
        if "step" in state:
            state["step"] = torch.full_like(state["step"], updates) if isinstance(state["step"], Tensor) else updates
    for group in optimizer.param_groups:
        if "step" in group or counts_per_group(optimizer):
            group["step"] = updates
    scheduler.last_epoch, scheduler._step_count = steps, steps + 1
    rates = [base * factor(steps) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
    engine._global_grad_norm = None  # that of a step which isn't among these
    if hasattr(engine.optimizer, "overflow"):
        engine.optimizer.overflow = False
    engine.global_steps = steps
    engine.micro_steps = steps * engine.gradient_accumulation_steps()
    engine.global_samples = steps * engine.train_batch_size()
