"""Which source gives each row of a run, and which of its rows that is: exact, endless, and known without going through the rows before.

Shares are whole rows per million, so the order of sources repeats with a period of at most a million rows; one period is worked out, and
everything else is arithmetic on it.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lavit_dist.data.compiled import compiled

MILLION = 1_000_000
"""Shares are kept in rows per million: decimal weights are exact, others off by a share of 10^-6."""
CACHED_CYCLES = 8
"""Periods kept, of at most 10 MB each: training is in one of them, planning and logging look at its neighbours."""

Shares = dict[str, int]
"""Rows per million of each source that gives any, by name; they add up to a million."""


@dataclass(frozen=True)
class Asked:
    """Weights from a row on. Only their ratios matter; a source that has none, or 0, gives no rows."""

    first_row: int
    weights: Mapping[str, float]


@dataclass(frozen=True)
class Phase:
    """Rows over which shares are constant; it ends where the next one begins."""

    first_row: int
    shares: Shares


@dataclass(frozen=True)
class Cycle:
    """One period of the order of sources, which are numbered here."""

    source_of: NDArray[np.int16]
    """The source of each row."""
    number_of: NDArray[np.int32]
    """How many rows of the same source come before it in the period."""
    rows_of: tuple[NDArray[np.int32], ...]
    """The rows of each source, in order."""

    def __len__(self) -> int:
        return len(self.source_of)

    def rows_before(self, source: int, row: int) -> int:
        """Rows that `source` gives before row `row`, counted from the start of any number of periods."""
        periods, rest = divmod(row, len(self))
        return periods * len(self.rows_of[source]) + int(np.searchsorted(self.rows_of[source], rest))

    def row_after(self, source: int, count: int) -> int:
        """The row that follows the `count`-th (from 1) of `source`."""
        periods, index = divmod(count - 1, len(self.rows_of[source]))
        return periods * len(self) + int(self.rows_of[source][index]) + 1


class Mixture:
    """The sources of all rows, phase after phase. Shares are kept to within a row, counted anew from the beginning of each phase."""

    def __init__(self, phases: Sequence[Phase] = ()) -> None:
        self.phases: list[Phase] = []
        self.end: int | None = None
        """The first row that no source is left for; None when there is none."""
        self._first_rows: list[int] = []
        self._names: list[tuple[str, ...]] = []
        self._periods: list[tuple[int, ...]] = []
        self._before: list[dict[str, int]] = []
        for phase in phases:
            self.append(phase)

    def append(self, phase: Phase) -> None:
        """Begins `phase`, which lasts until another is appended; the first begins at row 0."""
        assert phase.first_row >= self.phases[-1].first_row if self.phases else phase.first_row == 0
        assert sum(phase.shares.values()) == MILLION and min(phase.shares.values()) > 0
        self._before.append(self.consumed(phase.first_row))
        self._first_rows.append(phase.first_row)
        self._names.append(tuple(phase.shares))
        self._periods.append(_period(phase.shares))
        self.phases.append(phase)

    def locate(self, row: int) -> tuple[str, int]:
        """The source of a row, and which of the source's rows it is."""
        if self.end is not None and row >= self.end:
            raise IndexError(f"row {row} has no source: all are used up after {self.end} rows")
        index = bisect.bisect_right(self._first_rows, row) - 1
        offset, cycle = row - self._first_rows[index], _cycle(self._periods[index])
        periods, rest = divmod(offset, len(cycle))
        source = int(cycle.source_of[rest])
        name = self._names[index][source]
        return name, self._before[index].get(name, 0) + periods * len(cycle.rows_of[source]) + int(cycle.number_of[rest])

    def consumed(self, row: int) -> dict[str, int]:
        """Rows of each source among the first `row` rows."""
        if not self.phases:
            return {}
        index = bisect.bisect_right(self._first_rows, row) - 1
        phase, cycle = self.phases[index], _cycle(self._periods[index])
        consumed = dict(self._before[index])
        for source, name in enumerate(phase.shares):
            consumed[name] = consumed.get(name, 0) + cycle.rows_before(source, row - phase.first_row)
        return consumed

    def used_up(self, limits: Mapping[str, int]) -> int | None:
        """The first row by which a source of the last phase has given all of its `limits`; None when it goes on for ever."""
        phase, cycle = self.phases[-1], _cycle(self._periods[-1])
        left = {name: limits[name] - self._before[-1].get(name, 0) for name in phase.shares if name in limits}
        rows = [cycle.row_after(source, left[name]) for source, name in enumerate(phase.shares) if name in left]
        return phase.first_row + min(rows) if rows else None


def plan(asked: Sequence[Asked], limits: Mapping[str, int], history: Sequence[Phase] = (), first_row: int = 0) -> Mixture:
    """The mixture that goes on from `history` with what is `asked` from `first_row` on; `asked` is in order and begins at row 0.

    A source that has given the rows of its `limits` drops out, and the others share its weight in their proportions. Where shares stay
    as they were, no phase begins: the rows are then those of a run that was never interrupted.
    """
    mixture = Mixture([phase for phase in history if phase.first_row < first_row])
    in_force = bisect.bisect_right(asked, first_row, key=lambda part: part.first_row) - 1
    for index in range(in_force, len(asked)):
        row: int | None = max(first_row, asked[index].first_row)
        border = asked[index + 1].first_row if index + 1 < len(asked) else math.inf
        while row is not None and row < border:
            consumed = mixture.consumed(row)
            left = {
                name: weight for name, weight in asked[index].weights.items() if consumed.get(name, 0) < limits.get(name, math.inf)
            }
            if not any(left.values()):
                mixture.end = row
                return mixture
            shares = row_shares(left)
            if not mixture.phases or mixture.phases[-1].shares != shares:
                mixture.append(Phase(row, shares))
            row = mixture.used_up(limits)
    return mixture


def row_shares(weights: Mapping[str, float]) -> Shares:
    """Rows per million in the proportions of `weights`, at least one where the weight is above 0; names in alphabetical order."""
    total = math.fsum(weights.values())
    shares = {name: max(1, round(weight / total * MILLION)) for name, weight in sorted(weights.items()) if weight > 0}
    largest = max(shares, key=shares.__getitem__)
    shares[largest] += MILLION - sum(shares.values())
    return shares


def shares_cycle(shares: Shares) -> Cycle:
    """The order in which sources give rows under `shares`, in the order of their names there."""
    return _cycle(_period(shares))


def _period(shares: Shares) -> tuple[int, ...]:
    """Rows of each source in the shortest period."""
    common = math.gcd(*shares.values())
    return tuple(share // common for share in shares.values())


@lru_cache(maxsize=CACHED_CYCLES)
def _cycle(shares: tuple[int, ...]) -> Cycle:
    source_of = _order(np.array(shares, np.int64)) if len(shares) > 1 else np.zeros(shares[0], np.int16)
    number_of = np.empty(len(source_of), np.int32)
    rows_of = tuple(np.flatnonzero(source_of == source).astype(np.int32) for source in range(len(shares)))
    for rows in rows_of:
        number_of[rows] = np.arange(len(rows))
    return Cycle(source_of, number_of, rows_of)


@compiled
def _order(shares: NDArray[np.int64]) -> NDArray[np.int16]:
    """The source of each of `sum(shares)` rows, for two sources or more, by Tijdeman (The chairman assignment problem, 1980).

    Of k sources, each has after every row given its due to within 1 - 1 / (2k - 2) rows, the least that can be promised. A row goes to the
    source with the nearest deadline, that is, the row by which it would be behind by so much, among those that it would not put ahead by more.
    Dues are counted in integers, in units of 1 / (scale * length) rows.
    """
    length = shares.sum()
    source_of = np.empty(length, np.int16)
    scale = 2 * len(shares) - 2
    due = np.zeros(len(shares), np.int64)
    for row in range(length):
        nearest, chosen = np.int64(0), -1
        for source in range(len(shares)):
            due[source] += scale * shares[source]
            if due[source] >= length:
                deadline = -((due[source] - (scale - 1) * length) // (scale * shares[source]))
                if chosen < 0 or deadline < nearest:
                    nearest, chosen = deadline, source
        due[chosen] -= scale * length
        source_of[row] = chosen
    return source_of
