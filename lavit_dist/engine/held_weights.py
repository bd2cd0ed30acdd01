"""What one rank holds of each weight under any ZeRO stage: weight, fp32 master and optimizer state, as flat parts that belong together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lavit_dist.engine.adamw import MOMENTS, begin_adam, counts_per_group
from lavit_dist.engine.muon import MOMENTUM_BUFFER, MuonWithAdamW

KINDS = (*MOMENTS, MOMENTUM_BUFFER)
"""All of an optimizer's state that goes with a weight."""


@dataclass(frozen=True)
class HeldWeight:
    """One parameter as this rank has it; every tensor is a flat view."""

    name: str
    parameter: nn.Parameter
    whole: Tensor | None
    """All of this tensor rank's share of the weight; None where ZeRO-3 has cut it."""
    part: Tensor | None
    """What this data rank's optimizer updates; None where it updates nothing of this weight."""
    master: Tensor | None = None
    """The fp32 numbers of which `part` is the rounded form; None without ZeRO, where the weight is its own."""
    moments: dict[str, Tensor] = field(default_factory=dict)
    """The optimizer's averages of `part`; empty before the first step."""
    start: int = 0
    """Where `part` begins in the tensor rank's share of the weight."""


def held_weights(engine: Any) -> Iterator[HeldWeight]:
    """Every parameter of this rank's part of a DeepSpeed engine's model."""
    held = {0: _without_zero, 1: _of_zero_1_2, 2: _of_zero_1_2, 3: _of_zero_3}[engine.zero_optimization_stage()]
    states = optimizer_states(engine)
    for name, parameter in engine.module.named_parameters():
        yield held(engine.basic_optimizer, states, name, parameter)


def optimizer_states(engine: Any) -> dict[Any, dict[str, Any]]:
    """The optimizer's state by parameter, or by the flat part of several that ZeRO gives it."""
    optimizer = engine.basic_optimizer
    return optimizer.states() if isinstance(optimizer, MuonWithAdamW) else optimizer.state


def begin_state(engine: Any) -> None:
    """Gives the optimizer the state that it would make in its first step, where it has none."""
    optimizer = engine.basic_optimizer
    if isinstance(optimizer, MuonWithAdamW):
        optimizer.begin()
        return
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3 has them in the groups only while it steps
    for parameter in flat or [parameter for group in optimizer.param_groups for parameter in group["params"]]:
        begin_adam(optimizer.state[parameter], parameter)


def optimizer_steps(engine: Any) -> set[int]:
    """Every number of updates that the optimizer counted: one when all is well, none before the first."""
    states, groups = optimizer_states(engine), engine.basic_optimizer.param_groups
    counted_together: list[list[Any]] = [[state] for state in states.values()]
    if counts_per_group(engine.basic_optimizer) and any(group["params"] for group in groups):  # ZeRO-3 has them elsewhere
        # The one count that moves is the group's (apex) or that of its last weight (DeepSpeed); the others stay as they were loaded.
        counted_together = [[group, *(states.get(weight, {}) for weight in group["params"])] for group in groups]
    counts = [[int(holder["step"]) for holder in together if "step" in holder] for together in counted_together]
    return {max(steps) for steps in counts if steps}


def _without_zero(optimizer: Any, states: Any, name: str, parameter: nn.Parameter) -> HeldWeight:
    whole, state = parameter.detach().flatten(), states.get(parameter, {})
    return HeldWeight(name, parameter, whole, whole, moments={key: state[key].flatten() for key in KINDS if key in state})


def _of_zero_1_2(optimizer: Any, states: Any, name: str, parameter: nn.Parameter) -> HeldWeight:
    whole, mapping = parameter.detach().flatten(), getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return HeldWeight(name, parameter, whole, None)
    group = optimizer.param_groups[mapping.param_group_index]
    state, place = states.get(group["params"][0], {}), mapping.hp_fragment_address
    moments = {key: state[key].narrow(0, place.start, place.numel) for key in MOMENTS if key in state}
    start = mapping.lp_fragment_address.start
    return HeldWeight(name, parameter, whole, mapping.lp_fragment, mapping.hp_fragment.detach(), moments, start)


def _of_zero_3(optimizer: Any, states: Any, name: str, parameter: Any) -> HeldWeight:
    from deepspeed import comm
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    # DeepSpeed keeps small weights whole beside their parts.
    kept = parameter.ds_persist and parameter.ds_status == ZeroParamStatus.AVAILABLE
    whole = parameter.detach().flatten() if kept else None
    size = parameter.ds_tensor.ds_numel
    start = comm.get_rank(parameter.ds_process_group) * size
    real = min(max(parameter.ds_numel - start, 0), size)  # the rest is uninitialised padding
    part = parameter.ds_tensor.detach()[:real]
    if not parameter.requires_grad:
        return HeldWeight(name, parameter, whole, part, start=start)
    moments = {key: safe_get_local_optimizer_state(parameter, key)[:real] for key in MOMENTS if states}
    return HeldWeight(name, parameter, whole, part, safe_get_local_fp32_param(parameter).detach()[:real], moments, start)
