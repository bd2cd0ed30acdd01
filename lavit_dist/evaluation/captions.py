"""What a caption of a procedural scene says, against what is there."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lavit_dist.data.shapes import NUMBERS, POSITIONS

GROUP = re.compile(rf"\b({'|'.join(NUMBERS)}) small\b")
"""How a caption names objects beside the main one: "two small green squares"."""


def first_named(caption: str, values: Collection[str]) -> str | None:
    """The value that the caption names first: in these scenes, that of the main object. None when it names none."""
    return next((word for word in re.findall(r"[a-z]+", caption.lower()) if word in values), None)


def stated_position(caption: str) -> str | None:
    """Where the caption says that the main object is, or None when it doesn't say."""
    return next((name for name, phrase in POSITIONS.items() if phrase in caption.lower()), None)


def stated_count(caption: str) -> int | None:
    """How many objects the caption names in all, or None when it names the main one alone (a short caption may pass over others)."""
    numbers = [NUMBERS.index(number) for number in GROUP.findall(caption.lower())]
    return 1 + sum(numbers) if numbers else None


def main_objects_right(captions: Sequence[str], scenes: Sequence[Mapping[str, Any]]) -> dict[str, list[bool]]:
    """Whether each caption names the main object's colour and its shape right, and under `all` whether both."""
    values = {name: {thing[name] for scene in scenes for thing in scene["objects"]} for name in ("colour", "shape")}
    right = {
        name: [
            first_named(caption, values[name]) == scene["objects"][0][name] for caption, scene in zip(captions, scenes, strict=True)
        ]
        for name in values
    }
    return right | {"all": [colour and shape for colour, shape in zip(right["colour"], right["shape"], strict=True)]}


def score_captions(captions: Sequence[str], scenes: Sequence[Mapping[str, Any]]) -> dict[str, float | int]:
    """Shares of captions that are right about the main object, and about position and count where they state them.

    `scenes` are the metadata of procedural pairs; `all` counts captions with both colour and shape right.
    """
    right = main_objects_right(captions, scenes)
    places = [
        (place, scene.get("position"))
        for caption, scene in zip(captions, scenes, strict=True)
        if (place := stated_position(caption))
    ]
    counts = [
        (count, len(scene["objects"])) for caption, scene in zip(captions, scenes, strict=True) if (count := stated_count(caption))
    ]
    scores: dict[str, float | int] = {name: _share(of_captions) for name, of_captions in right.items()}
    scores |= {"position": _share([said == true for said, true in places]), "position_stated": len(places)}
    return scores | {"count": _share([said == true for said, true in counts]), "count_stated": len(counts)}


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right) if right else 0.0
