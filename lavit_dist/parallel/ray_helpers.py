"""Actors that serve another actor: beside it on its node, started again when they die, gone when it goes."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

RETRIES = 3
"""How often Ray calls again what a helper died of, on a new one."""


class Helpers:
    """Actors of one class; each call goes to the one with the least to do. For use within an actor of `run_jobs`.

    They take their place in their owner's share of the node. A call must be safe to repeat: when its actor dies, Ray starts the
    actor anew, without what it held, and repeats the call `RETRIES` times, after which the result raises `ray.exceptions.RayActorError`.
    """

    def __init__(self, kind: type, arguments: tuple[Any, ...], count: int, num_cpus: float) -> None:
        """Each is a `kind(*arguments)` and counts as `num_cpus` CPUs."""
        import ray

        remote_class: Any = ray.remote(kind)
        options = {"num_cpus": num_cpus, "max_restarts": -1, "max_task_retries": RETRIES}
        self._actors = [remote_class.options(**options).remote(*arguments) for _ in range(count)]
        self._calls = [0] * count
        self._lock = threading.Lock()

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """The result to come of `method(*arguments)` on one of them; it raises what the method raises, as Ray hands it on."""
        with self._lock:
            number = self._calls.index(min(self._calls))
            self._calls[number] += 1
        future: Future[Any] = getattr(self._actors[number], method).remote(*arguments).future()
        future.add_done_callback(lambda _: self._end(number))
        return future

    def _end(self, number: int) -> None:
        with self._lock:
            self._calls[number] -= 1
