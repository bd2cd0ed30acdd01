"""Packing whole documents into rows of constant length: best fit, in random order, with rows that are closed as exactly as can be.

Best-fit decreasing places the longest documents first. It leaves rows of like documents, and gaps that are shorter than any
document. Here a row is filled in the order of the documents until two of the longest would fill it; what remains of it goes to
the pair of documents, of any that are left, that fills it best.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lavit_dist.data.compiled import compiled

PACKER_VERSION = 2
"""Part of every plan's digest; raise it when the rows that the same input gives change."""
PAIRS_TRIED = 64
"""Longer partners of a pair that are tried before the best pair so far is taken."""


def pack(lengths: NDArray[np.integer], capacity: int) -> NDArray[np.int64]:
    """The row of each document, rows numbered from 0 as they are filled.

    A row is closed when none of the documents that are left fits it. Which lengths are left is a bit set, so that the next shorter
    one is found in `capacity` / 64 steps at most, whatever the number of documents; of equal ones the first goes first. Raises
    `ValueError` for a length that exceeds `capacity` or isn't positive.
    """
    if lengths.size and not 0 < int(lengths.min()) <= int(lengths.max()) <= capacity:
        raise ValueError(
            f"documents of {int(lengths.min())} to {int(lengths.max())} tokens can't be packed into rows of {capacity}"
        )
    rows: NDArray[np.int64] = _pack(lengths.astype(np.int64), capacity)
    return rows


@compiled
def _pack(lengths: Any, capacity: int) -> Any:
    row_of = np.full(lengths.size, -1, np.int64)
    first = np.full(capacity + 1, -1, np.int64)  # of the documents of a length that are left
    following = np.full(lengths.size, -1, np.int64)  # the next of equal length
    left = np.zeros(capacity + 1, np.int64)
    words = np.zeros((capacity >> 6) + 1, np.uint64)  # bit n: documents of length n are left
    for document in range(lengths.size - 1, -1, -1):
        length = lengths[document]
        following[document] = first[length]
        first[length] = document
        left[length] += 1
        words[length >> 6] |= np.uint64(1) << np.uint64(length & 63)
    longest = lengths.max() if lengths.size else 0
    row, room, cursor = 0, capacity, 0
    while cursor < lengths.size:
        if room == capacity or room > 2 * longest:
            chosen = lengths[cursor], -1
        else:
            chosen = _best_pair(words, left, room)
            if chosen[0] < 0:
                row += 1
                room = capacity
                continue
        for length in chosen:
            if length > 0:
                document = first[length]
                first[length] = following[document]
                left[length] -= 1
                if left[length] == 0:
                    words[length >> 6] &= ~(np.uint64(1) << np.uint64(length & 63))
                row_of[document] = row
                room -= length
        while cursor < lengths.size and row_of[cursor] >= 0:
            cursor += 1
    return row_of


@compiled
def _best_pair(words: Any, left: Any, room: int) -> Any:
    """The two lengths, the longer one first, that together come closest to `room`; -1 in the place of one that is not there."""
    best = (-1, -1)
    filled = 0
    longer = _largest_at_most(words, room)
    for _ in range(PAIRS_TRIED):
        if longer < 0 or 2 * longer <= filled:
            break
        shorter = _largest_at_most(words, min(room - longer, longer))
        if shorter == longer and left[longer] < 2:
            shorter = _largest_at_most(words, longer - 1)
        together = longer + max(shorter, 0)
        if together > filled:
            best = (longer, shorter)
            filled = together
            if filled == room:
                break
        longer = _largest_at_most(words, longer - 1)
    return best


@compiled
def _largest_at_most(words: Any, limit: int) -> int:
    """The highest set bit that is not above `limit`; -1 if there is none."""
    if limit < 0:
        return -1
    index = limit >> 6
    word = words[index] & (np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(63 - (limit & 63)))
    while word == 0:
        index -= 1
        if index < 0:
            return -1
        word = words[index]
    highest = 0
    for half in (32, 16, 8, 4, 2, 1):
        if word >> np.uint64(half):
            word >>= np.uint64(half)
            highest += half
    return (index << 6) + highest
