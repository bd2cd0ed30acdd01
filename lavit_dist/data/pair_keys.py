"""Names that are safe as members of a tar, and the choice of held-out pairs by name."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence

from lavit_dist.data.hashing import stable_fraction, stable_hash

SAFE_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
"""No dot, which would begin a suffix; no slash; short enough for a tar header with any suffix."""


def make_keys(names: Iterable[tuple[str, str]]) -> list[str]:
    """A safe key, unlike all others, for each (wanted key, name of the picture).

    A wanted key that is safe and the first of its kind is kept. Any other is cleaned and ends in a hash of both names.
    """
    wanted = list(names)
    first_of: dict[str, int] = {}
    for position, (key, _) in enumerate(wanted):
        if SAFE_KEY.fullmatch(key):
            first_of.setdefault(key, position)
    taken = set(first_of)
    keys = []
    for position, (key, name) in enumerate(wanted):
        if first_of.get(key) != position:
            key = _replacement(key, name, taken)
            taken.add(key)
        keys.append(key)
    return keys


def heldout_place(key: str, seed: int) -> float:
    """A number in [0, 1): those below a fraction are held out with it."""
    return stable_fraction("heldout", seed, key)


def choose_heldout(keys: Sequence[str], fraction: float, seed: int, usable: Callable[[str], bool]) -> set[str]:
    """The keys whose hash falls below `fraction`.

    Where `fraction` is above 0 and two pairs are usable, at least one usable pair is held out and at least one is not.
    """
    if fraction == 0:
        return set()
    place = {key: heldout_place(key, seed) for key in keys}
    order = sorted(keys, key=lambda key: (place[key], key))
    first = next(filter(usable, order), "")
    last = next(filter(usable, reversed(order)), "")
    return ({key for key in keys if place[key] < fraction} | {first}) - {last}


def _replacement(key: str, name: str, taken: set[str]) -> str:
    cleaned = re.sub(r"[^A-Za-z0-9_-]+", "_", key)[:60]
    candidates = (f"{cleaned}-{stable_hash('key', key, name, attempt):016x}" for attempt in itertools.count())
    return next(candidate for candidate in candidates if candidate not in taken)
