"""Which pairs of a set are wanted."""

from __future__ import annotations

from typing import Literal

from lavit_dist.config.base import config
from lavit_dist.errors import check


@config
class FilterRule:
    """What one column must be for a pair to be kept; all that is given must hold."""

    min: float | None = None
    """Least number."""
    max: float | None = None
    """Greatest number."""
    any_of: tuple[str, ...] | None = None
    """The texts that are wanted, such as [UNLIKELY] of LAION's NSFW; case counts."""
    none_of: tuple[str, ...] | None = None
    """The texts that are not."""
    missing: Literal["drop", "keep"] = "drop"
    """What becomes of a pair without the column, with null in it, or with no number where `min` or `max` asks for one."""

    def check_as(self, name: str) -> None:
        """Raises `UserError` for a rule, called `name`, that asks for nothing or that no pair meets."""
        check(
            any(value is not None for value in (self.min, self.max, self.any_of, self.none_of)),
            f"{name} asks for nothing; give min, max, any_of or none_of.",
        )
        check(
            self.min is None or self.max is None or self.min <= self.max,
            f"{name} has min {self.min} above max {self.max}, which no pair meets; exchange them.",
        )
