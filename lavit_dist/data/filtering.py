"""Leaving out pairs by what is known of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lavit_dist.config.filter import FilterRule

SIZE_COLUMNS = ("image_width", "image_height", "image_shorter_side", "image_aspect_ratio")
"""Columns that every picture has, beside those of its .json: pixels, and the longer over the shorter side."""


def refusing_rule(rules: Mapping[str, FilterRule], values: Mapping[str, Any]) -> str | None:
    """The first column of `rules` that leaves out a pair with `values`; None when it is wanted."""
    return next((column for column, rule in rules.items() if not _is_met(rule, values.get(column))), None)


def image_columns(width: int, height: int) -> dict[str, float]:
    """`SIZE_COLUMNS` of a picture."""
    shorter, longer = sorted((width, height))
    return dict(zip(SIZE_COLUMNS, (width, height, shorter, longer / shorter), strict=True))


def _is_met(rule: FilterRule, value: Any) -> bool:
    if value is None:
        return rule.missing == "keep"
    if rule.min is not None or rule.max is not None:
        number = _number(value)
        if number is None:
            return rule.missing == "keep"
        if not (-math.inf if rule.min is None else rule.min) <= number <= (math.inf if rule.max is None else rule.max):
            return False
    text = str(value)
    return (rule.any_of is None or text in rule.any_of) and (rule.none_of is None or text not in rule.none_of)


def _number(value: Any) -> float | None:
    """LAION's tables hold some of their numbers as text."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number
