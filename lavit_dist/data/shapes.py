"""Procedural scenes of coloured shapes with compositional captions: a set whose every caption can be checked exactly.

A scene has one large main object, which captions name first, up to three small ones, and a muted background. Everything about scene
`index` of a split is a pure function of (settings, split, index). Some combinations of the main object's attributes are held out:
they occur as the main object in the held-out split alone, though each of their values is common in training.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from lavit_dist.data.hashing import stable_hash

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (220, 38, 38),
    "green": (34, 150, 62),
    "blue": (37, 84, 226),
    "yellow": (250, 215, 30),
    "purple": (124, 36, 190),
    "orange": (250, 128, 20),
    "white": (252, 252, 252),
    "black": (16, 16, 18),
}
TINTS = {
    "grey": (150, 152, 154),
    "beige": (190, 172, 142),
    "mint": (146, 184, 166),
    "lilac": (170, 156, 192),
    "pink": (204, 160, 170),
    "slate": (96, 112, 130),
}
"""Background colours: muted and of middle brightness, so that every object stands out, white and black too."""
TEXTURES = ("plain", "shaded", "striped", "cloudy")
POSITIONS = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
}
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "position": tuple(POSITIONS),
    "texture": TEXTURES,
    "tint": tuple(TINTS),
}
"""What combinations can be held out of: the main object's attributes and the background's."""

MAIN_SIZE = (0.44, 0.56)
"""Width of the main object as a share of the image: 28 to 36 of 64 pixels."""
SMALL_SIZE = (0.15, 0.21)
"""Width of the other objects: about 10 to 13 of 64 pixels."""
GAP = 0.02
"""Least distance between objects, and to the border, as a share of the image."""
MAX_OBJECTS = 4
NUMBERS = ("no", "a", "two", "three")


@dataclass(frozen=True)
class Thing:
    """One object; `x`, `y` (its centre) and `size` (its width and height) are shares of the image's side."""

    shape: str
    colour: str
    size: float
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """Everything that the picture and its captions say; `things[0]` is the main object and `position` is its place."""

    things: tuple[Thing, ...]
    position: str
    texture: str
    tint: str
    captions: tuple[str, ...]

    def metadata(self, image_size: int) -> dict[str, Any]:
        """The ground truth that is written beside the picture; lengths in pixels."""
        objects = [
            {
                "shape": thing.shape,
                "colour": thing.colour,
                "size": round(thing.size * image_size, 2),
                "x": round(thing.x * image_size, 2),
                "y": round(thing.y * image_size, 2),
            }
            for thing in self.things
        ]
        background = {"texture": self.texture, "tint": self.tint}
        return {"objects": objects, "position": self.position, "background": background, "captions": list(self.captions)}


@dataclass(frozen=True)
class SceneMaker:
    """Makes the scenes of a set, one at a time and in any order."""

    seed: int
    max_objects: int
    train: tuple[dict[str, str], ...]
    """The combinations of attributes that main objects take in training, in a shuffled order."""
    heldout: tuple[dict[str, str], ...]
    """Those they take in the held-out split."""

    def scene(self, split: str, index: int) -> Scene:
        """Scene `index` of `split`. Every combination of the split takes its turn, so each is as frequent as any other."""
        rng = np.random.Generator(np.random.PCG64([self.seed, stable_hash(split), index]))
        combinations = self.heldout if split == "heldout" else self.train
        chosen = {name: _pick(rng, values) for name, values in ATTRIBUTES.items()} | combinations[index % len(combinations)]
        groups = _pick_groups(rng, self.max_objects, chosen["colour"])
        things = _place(rng, chosen, groups)
        return Scene(things, chosen["position"], chosen["texture"], chosen["tint"], _write_captions(chosen, groups))


def make_scene_maker(
    seed: int, held_out_attributes: tuple[str, ...], held_out_fraction: float, max_objects: int = MAX_OBJECTS
) -> SceneMaker:
    """Splits the combinations of `held_out_attributes` into those of the training split and those of the held-out one.

    The held-out ones are spread as evenly as their number allows over the values of each attribute. A fraction of 0 holds none out:
    the held-out split then has new scenes of the same combinations.
    """
    domains = [ATTRIBUTES[name] for name in held_out_attributes]
    combinations = sorted(itertools.product(*domains), key=lambda values: stable_hash("held out", seed, *values))
    wanted = round(held_out_fraction * len(combinations))
    held: set[tuple[str, ...]] = set()
    counts = [dict.fromkeys(domain, 0) for domain in domains]
    slack = 0
    while len(held) < wanted:
        for values in combinations:
            room = all(count[value] < math.ceil(wanted / len(count)) + slack for count, value in zip(counts, values, strict=True))
            if room and values not in held and len(held) < wanted:
                held.add(values)
                for count, value in zip(counts, values, strict=True):
                    count[value] += 1
        slack += 1
    named = [dict(zip(held_out_attributes, values, strict=True)) for values in combinations]
    train = tuple(names for names, values in zip(named, combinations, strict=True) if values not in held)
    heldout = tuple(names for names, values in zip(named, combinations, strict=True) if values in held)
    return SceneMaker(seed, max_objects, train, heldout or train)


@dataclass(frozen=True)
class _Group:
    """Some small objects of one kind: what a caption calls "two small green squares"."""

    number: int
    colour: str
    shape: str


def _pick(rng: np.random.Generator, values: tuple[str, ...]) -> str:
    return values[int(rng.integers(len(values)))]


def _pick_groups(rng: np.random.Generator, max_objects: int, main_colour: str) -> list[_Group]:
    """At most two kinds of small objects, each unlike the main object and the other kind in colour."""
    others = int(rng.integers(max_objects))
    first = int(rng.integers(1, others + 1)) if others else 0
    colours = [main_colour]
    groups = []
    for number in (first, others - first):
        if number:
            colour = _pick(rng, tuple(name for name in COLOURS if name not in colours))
            colours.append(colour)
            groups.append(_Group(number, colour, _pick(rng, SHAPES)))
    return groups


def _place(rng: np.random.Generator, chosen: dict[str, str], groups: list[_Group]) -> tuple[Thing, ...]:
    """Draws places until no two objects touch."""
    while True:
        size = rng.uniform(*MAIN_SIZE)
        near = size / 2 + GAP + rng.uniform(0, 0.04)
        along = rng.uniform(0.44, 0.56)
        x, y = {
            "left": (near, along),
            "right": (1 - near, along),
            "top": (along, near),
            "bottom": (along, 1 - near),
            "centre": (along, rng.uniform(0.44, 0.56)),
        }[chosen["position"]]
        things = [Thing(chosen["shape"], chosen["colour"], size, x, y)]
        for group in groups:
            for _ in range(group.number):
                placed = _place_small(rng, group, things)
                if placed is not None:
                    things.append(placed)
        if len(things) == 1 + sum(group.number for group in groups):
            return tuple(things)


def _place_small(rng: np.random.Generator, group: _Group, things: list[Thing]) -> Thing | None:
    for _ in range(40):
        size = rng.uniform(*SMALL_SIZE)
        x, y = rng.uniform(size / 2 + GAP, 1 - size / 2 - GAP, 2)
        if all(max(abs(x - other.x), abs(y - other.y)) > (size + other.size) / 2 + GAP for other in things):
            return Thing(group.shape, group.colour, size, float(x), float(y))
    return None


def _write_captions(chosen: dict[str, str], groups: list[_Group]) -> tuple[str, ...]:
    """A full caption, which names every object and where the main one is, and a short one of the main object alone."""
    main = f"{chosen['colour']} {chosen['shape']}"
    others = " and ".join(_name_group(group) for group in groups)
    full = f"a large {main} {POSITIONS[chosen['position']]}" + (f" with {others}" if others else "")
    return full, f"{'an' if main[0] in 'aeiou' else 'a'} {main}"


def _name_group(group: _Group) -> str:
    plural = {1: "", 2: "s", 3: "s"}[group.number]
    ending = "es" if plural and group.shape.endswith("s") else plural
    return f"{NUMBERS[group.number]} small {group.colour} {group.shape}{ending}"
