"""Reading the next step's data while this step is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

Data = TypeVar("Data")


class ReadAhead(Generic[Data]):
    """`ahead(step)` is `read(step)`, which depends on the step alone; step after step it has been read by the time that it is asked for.

    All reading is done by one thread, one step at a time.
    """

    def __init__(self, read: Callable[[int], Data], end: int) -> None:
        """Steps from `end` on are read only when they are asked for."""
        self._read, self._end = read, end
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self._step = -1
        self._next: Future[Data] | None = None

    def __call__(self, step: int) -> Data:
        """Raises what `read` raised."""
        asked = self._next if self._next is not None and self._step == step else self._thread.submit(self._read, step)
        data = asked.result()
        self._step, self._next = step + 1, self._thread.submit(self._read, step + 1) if step + 1 < self._end else None
        return data

    def forget(self) -> None:
        """What was read ahead is of other data than is wanted now. When this returns, nothing is being read."""
        if self._next is not None and not self._next.cancel():
            wait([self._next])
        self._next = None
