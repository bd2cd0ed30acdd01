"""Packing whole documents into rows of constant length: best-fit decreasing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PACKER_VERSION = 1
"""Part of every plan's digest; raise it when the rows that the same input gives change."""


def best_fit_decreasing(lengths: NDArray[np.integer], capacity: int) -> NDArray[np.int64]:
    """The row of each document, rows numbered from 0 as they are opened.

    Documents are placed from the longest to the shortest (equal ones in their given order), each into the row with the least room that
    still takes it, or into a new one. Rows of equal room are found through a bit set over the amounts of room, a single
    Python integer, so a placement costs a shift of `capacity` bits. No length may exceed `capacity`.
    """
    if lengths.size and int(lengths.max()) > capacity:
        raise ValueError(f"a document of {int(lengths.max())} tokens can't be packed into rows of {capacity}")
    row_of = np.empty(lengths.size, np.int64)
    rows_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    occupied = 0  # bit c is set when some row has room for exactly c tokens
    num_rows = 0
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = occupied >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                occupied ^= 1 << room
        else:
            room, row = capacity, num_rows
            num_rows += 1
        row_of[document] = row
        if room > length:
            rows_with_room[room - length].append(row)
            occupied |= 1 << (room - length)
    return row_of
