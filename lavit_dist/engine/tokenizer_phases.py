"""Which phase of a tokenizer's training a step belongs to, and what it changes on the way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from lavit_dist.config.tokenizer import PhaseConfig, TrainTokenizerConfig


class Phase(NamedTuple):
    """A phase of a run, and the optimizer step that it starts at."""

    name: str
    config: PhaseConfig
    first_step: int


def phases_of(config: TrainTokenizerConfig) -> Iterator[Phase]:
    """The phases with their first steps."""
    first = 0
    for name, settings in config.schedule.items():
        yield Phase(name, settings, first)
        first += settings.steps


def phase_of(config: TrainTokenizerConfig, step: int) -> Phase:
    """The phase that optimizer step `step` (from 0) belongs to."""
    return [phase for phase in phases_of(config) if phase.first_step <= step][-1]


def gumbel_temperature(settings: PhaseConfig, step: int) -> float:
    """The temperature of Eq. 1 at step `step` (from 0) of a phase: geometric from the first to the final one."""
    final = settings.final_gumbel_temperature or settings.gumbel_temperature
    progress = min(1.0, step / max(1, settings.steps - 1))
    return float(settings.gumbel_temperature * (final / settings.gumbel_temperature) ** progress)
