"""Which images of a set are copies of earlier ones, by 64-bit perceptual hashes.

Hashes that differ in at most d of 64 bits agree on all bits of some d of 2d blocks (Manku, Jain, Sarma, Detecting near-duplicates for web
crawling, WWW 2007): for each choice of d blocks, which is 32 bits, hashes are sorted by these, and compared with those that share them.
"""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

from lavit_dist.data.compiled import compiled

HASH_BITS = 64
LARGEST_DISTANCE = 4
"""Bits in which two hashes may differ to count as one image; beyond, pictures that merely look alike do too, and tables are many."""


def find_copies(hashes: NDArray[np.uint64], max_distance: int, staying: int = 0) -> NDArray[np.bool_]:
    """Which images [image] differ in at most `max_distance` bits, 0 to `LARGEST_DISTANCE`, from an earlier one that is no copy itself.

    The first `staying` images count as none, whatever they are like.
    It takes some 130 bytes per image, and time in proportion to images beside that for pairs that agree in 32 bits.
    """
    different, first = np.unique(hashes, return_index=True)
    copies = np.ones(len(hashes), np.bool_)
    copies[first] = False
    copies[:staying] = False
    if max_distance == 0:
        return copies
    order = np.argsort(first)
    kept = different[order]  # each hash once, as they come
    near = _near_earlier(kept, max_distance, int((first < staying).sum()))
    copies[first[order[near]]] = True
    return copies


def _near_earlier(hashes: NDArray[np.uint64], max_distance: int, staying: int) -> NDArray[np.bool_]:
    """`find_copies` of hashes that are all different."""
    pairs = [np.empty((0, 2), np.int64)]
    edges = np.linspace(0, HASH_BITS, 2 * max_distance + 1).round().astype(int).tolist()
    blocks = [(1 << end) - (1 << start) for start, end in pairwise(edges)]
    for chosen in combinations(blocks, max_distance):
        shared = hashes & np.uint64(sum(chosen))
        order = np.argsort(shared, kind="stable")
        starts = np.flatnonzero(np.diff(shared[order], prepend=~shared[order[:1]]))
        pairs.append(_close_pairs(hashes, order, np.append(starts, len(order)), max_distance))
    found = np.unique(np.concatenate(pairs), axis=0)  # by the later of two
    near = np.zeros(len(hashes), np.bool_)
    _mark(found, near, staying)
    return near


@compiled
def _close_pairs(
    hashes: NDArray[np.uint64], order: NDArray[np.int64], starts: NDArray[np.int64], max_distance: int
) -> NDArray[np.int64]:
    """The pairs [pair, (later, earlier)] of each group, order[starts[i]] to order[starts[i + 1] - 1], that are close."""
    count = 0
    pairs = np.empty((1024, 2), np.int64)
    for group in range(len(starts) - 1):
        for place in range(starts[group], starts[group + 1]):
            for other in range(starts[group], place):
                bits = hashes[order[place]] ^ hashes[order[other]]
                distance = 0
                while bits and distance <= max_distance:
                    bits &= bits - np.uint64(1)
                    distance += 1
                if distance <= max_distance:
                    if count == len(pairs):
                        grown = np.empty((2 * count, 2), np.int64)
                        grown[:count] = pairs
                        pairs = grown
                    pairs[count] = order[place], order[other]  # within a group the order is that of the hashes
                    count += 1
    return pairs[:count]


@compiled
def _mark(pairs: NDArray[np.int64], near: NDArray[np.bool_], staying: int) -> None:
    """Marks what is close to an earlier one that isn't marked, but for the first `staying`; the pairs are sorted by the later."""
    for pair in range(len(pairs)):
        later, earlier = pairs[pair]
        if later >= staying and not near[earlier]:
            near[later] = True
