"""The order of documents: a pure function of seed and epoch. A two-level permutation keeps reads local without weakening the shuffle."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK_DOCUMENTS = 65_536
"""Documents that are shuffled and packed together, at least: smaller blocks waste more in their last, unfilled rows."""

SHARDS, DOCUMENTS, ROWS, ORIENTATION, CAPTION_DROPOUT, IMAGES, CAPTIONS = range(7)
"""What a hash is for; equal seeds then give unrelated values for different uses."""

UInt64Array = NDArray[np.uint64]


def hash64(values: UInt64Array, *key: int) -> UInt64Array:
    """Each value hashed with `key` to 64 uniform bits (splitmix64). For one key it is a bijection: different values never collide.

    It is written out here because NumPy doesn't promise that its random streams stay the same between versions.
    """
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mix(state ^ np.uint64(part % 2**64))
    return _mix(values ^ state)


def fractions(values: UInt64Array, *key: int) -> NDArray[np.float64]:
    """`hash64` as numbers in [0, 1)."""
    return (hash64(values, *key) >> np.uint64(11)) * np.float64(2.0**-53)


def permutation(size: int, *key: int) -> NDArray[np.int64]:
    """The order of 0..size-1 that `key` names."""
    return np.argsort(hash64(np.arange(size, dtype=np.uint64), *key))


def epoch_blocks(
    shard_starts: NDArray[np.int64], seed: int, epoch: int, block_documents: int = BLOCK_DOCUMENTS
) -> list[NDArray[np.int64]]:
    """The shards of each block of an epoch: shuffled shards, grouped in that order until a block has `block_documents`.

    Shard i holds documents `shard_starts[i]` to `shard_starts[i + 1]`. A remainder that is too small joins the last block.
    """
    sizes = np.diff(shard_starts)
    order = permutation(len(sizes), seed, epoch, SHARDS)
    blocks: list[list[int]] = [[]]
    filled = 0
    for shard in order.tolist():
        if filled >= block_documents:
            blocks.append([])
            filled = 0
        blocks[-1].append(shard)
        filled += int(sizes[shard])
    if filled < block_documents and len(blocks) > 1:
        last = blocks.pop()
        blocks[-1] += last
    return [np.array(block, np.int64) for block in blocks]


def block_places(size: int, seed: int, epoch: int, block: int) -> NDArray[np.int64]:
    """The place of each of the `size` documents of a block in its shuffled order."""
    places = np.empty(size, np.int64)
    places[permutation(size, seed, epoch, DOCUMENTS, block)] = np.arange(size)
    return places


def _mix(values: UInt64Array) -> UInt64Array:
    """The splitmix64 step: add the golden ratio, then the finalizer of Steele et al. (2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
