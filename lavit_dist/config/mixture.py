"""Several id sets in one training run: how much of each, from which step on, and at most how often."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import NonNegativeFloat, PositiveInt

from lavit_dist.config.base import config
from lavit_dist.errors import check

SOLE_SOURCE = "ids"
"""Name of the source that `ids` stands for. A source of this name keeps its rows when a run that was begun with `ids` gets others."""
WeighBy = Literal["tokens", "documents"]
LEGAL_NAME = re.compile(r"[A-Za-z0-9_-]+")


@config
class SourceConfig:
    """One id set of a mixture."""

    ids: str
    """Folder of one split of an id set (such as ids/train)."""
    weight: NonNegativeFloat = 1.0
    """How much of it beside the others; only ratios matter. 0 leaves it out until the curriculum brings it in."""
    max_epochs: PositiveInt | None = None
    """Times that its documents are read at most; then the others share its weight. None sets no limit."""


@config
class CurriculumConfig:
    """Other weights from a step on."""

    from_step: PositiveInt
    """First optimizer step, counted from 0, that they hold for."""
    weights: dict[str, NonNegativeFloat]
    """Weights by source; sources that are left out keep theirs."""


def weights_from_steps(
    sources: Mapping[str, SourceConfig], curriculum: Sequence[CurriculumConfig]
) -> list[tuple[int, dict[str, float]]]:
    """The weights of all sources with the step from which they hold; the first is step 0."""
    phases = [(0, {name: source.weight for name, source in sources.items()})]
    for part in curriculum:
        phases.append((part.from_step, phases[-1][1] | part.weights))
    return phases


def check_mixture(
    ids: str | None,
    sources: Mapping[str, SourceConfig],
    curriculum: Sequence[CurriculumConfig],
    weigh_by: WeighBy,
    total_steps: int,
) -> None:
    """Raises `UserError` for settings of a mixture that can't be meant."""
    check(
        (ids is None) != (not sources),
        f"ids {ids} is one id set, and sources ({', '.join(sources)}) are several; keep one of these settings, for one set or a mixture."
        if sources
        else "Neither ids nor sources is set; give ids the folder of an id set, or sources several by name.",
    )
    for setting, default in {"curriculum": not curriculum, "weigh_by": weigh_by == "tokens"}.items():
        check(
            bool(sources) or default,
            f"{setting} has no meaning with the one id set of ids; leave it out, or name id sets under sources.",
        )
    for name in sources:
        check(
            LEGAL_NAME.fullmatch(name) is not None,
            f"sources has the name {name!r}; names may hold letters, digits, _ and -: choose one of those.",
        )
    for before, part in zip((None, *curriculum), curriculum, strict=False):
        first = before.from_step if before else 0
        check(
            first < part.from_step < total_steps,
            f"curriculum has from_step {part.from_step} after {first}, with total_steps {total_steps}; let steps rise, below total_steps.",
        )
        unknown = sorted(part.weights.keys() - sources.keys())
        check(
            not unknown,
            f"curriculum from_step {part.from_step} weighs {', '.join(unknown)}, which sources lacks; choose of {', '.join(sources)}.",
        )
    for step, weights in weights_from_steps(sources, curriculum):
        check(
            not sources or any(weights.values()),
            f"From step {step} on every source has the weight 0; give one a weight in"
            f" {f'curriculum from_step {step}' if step else 'sources'}.",
        )
