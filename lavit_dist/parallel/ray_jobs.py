"""Independent named jobs on Ray actors that each load their models once.

Progress is keyed on jobs, never on Ray's blocks: what a job produces lies in files that it commits itself, so a run that is killed
loses at most one job per actor.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from lavit_dist.config.ray import RayConfig
from lavit_dist.errors import UserError, check

logger = logging.getLogger(__name__)
MEBIBYTE = 2**20
SECONDS_FOR_NODES = 300


class Worker(Protocol):
    """What an actor runs. Its constructor only keeps its arguments: errors in it are reported less well than those of `start`."""

    def start(self) -> None:
        """Loads what every job needs."""

    def run(self, job: Any) -> Any:
        """Does one job and returns a small description of it."""


@dataclass(frozen=True)
class Outcome:
    """The end of a job."""

    name: str
    result: Any
    """What `Worker.run` returned; None if it failed."""
    error: str | None
    """The last error, after all retries; None if it succeeded."""


@contextmanager
def ray_cluster(config: RayConfig) -> Iterator[None]:
    """Connects to the cluster that the settings name, or starts Ray on this machine, and leaves or ends it."""
    # Ray reads these when it is imported. It sends usage reports to its makers, and outside Windows and macOS it listens on all
    # interfaces even if it serves this machine alone; the second variable makes it treat Linux like those two.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if config.address is None:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    if config.address is None:
        num_cpus = config.num_cpus or len(os.sched_getaffinity(0))
        store = config.object_store_mb * MEBIBYTE
        ray.init(
            address="local",
            num_cpus=num_cpus,
            object_store_memory=store,
            include_dashboard=False,
            logging_level=logging.ERROR,
            _system_config={
                "worker_niceness": 0
            },  # by default actors give way to all other processes, and starve on a busy machine
        )
    else:
        try:
            ray.init(address=config.address, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"No Ray cluster can be reached at ray.address {config.address} ({error}); start one there, or leave it out to run here."
            ) from error
    try:
        _wait_for_nodes(config)
        yield
    finally:
        ray.shutdown()


def run_jobs(worker: type[Worker], arguments: tuple[Any, ...], jobs: Mapping[str, Any], config: RayConfig) -> Iterator[Outcome]:
    """Runs every job on actors made by `worker(*arguments)` and yields their outcomes as they end, within `ray_cluster`.

    A job that raises, or whose process dies, is tried again `max_retries` times. An actor is given a job only when it is up, so actors
    that the cluster has no room for hold nothing up. A `UserError` of `start` is raised here.
    """
    waiting = deque(jobs)
    failures = dict.fromkeys(jobs, 0)
    left = len(jobs)
    with closing(_ActorPool(worker, arguments, config)) as pool:
        for _ in range(min(len(jobs), _room_for_actors(config))):
            pool.add_actor()
        while left:
            name, result, error = pool.next_event()
            if name is not None and error is not None:
                failures[name] += 1
                logger.warning("%s failed (try %d of %d): %s", name, failures[name], config.max_retries + 1, error)
                if failures[name] <= config.max_retries:
                    waiting.append(name)
                    name = None
            if name is not None:
                left -= 1
                yield Outcome(name, result, error)
            while waiting and pool.idle:
                name = waiting.popleft()
                pool.give(name, jobs[name])


class _ActorPool:
    """Actors of one kind; one that dies is replaced."""

    def __init__(self, worker: type[Worker], arguments: tuple[Any, ...], config: RayConfig) -> None:
        import ray

        self.arguments, self.max_retries, self.failed_starts = arguments, config.max_retries, 0
        self.remote_class = ray.remote(worker).options(num_cpus=config.cpus_per_actor, num_gpus=config.gpus_per_actor)
        self.idle: list[Any] = []
        self.awaited: dict[Any, tuple[Any, str | None]] = {}
        """The actor behind each result that is awaited, and the name of its job, or None for its start."""

    def add_actor(self) -> None:
        """Asks for another actor; it is idle once it is up."""
        actor = self.remote_class.remote(*self.arguments)
        self.awaited[actor.start.remote()] = (actor, None)

    def give(self, name: str, job: Any) -> None:
        """Gives an idle actor a job."""
        actor = self.idle.pop()
        self.awaited[actor.run.remote(job)] = (actor, name)

    def next_event(self) -> tuple[str | None, Any, str | None]:
        """Waits until a job ends or an actor is up: the job's name, or None, its result and its error."""
        import ray
        from ray.exceptions import RayActorError, RayError

        (done,), _ = ray.wait(list(self.awaited), num_returns=1)
        actor, name = self.awaited.pop(done)
        try:
            result = ray.get(done)
        except RayError as error:
            died = isinstance(error, RayActorError)
            if name is None:
                self._check_start(error, died)
            if died:
                self.add_actor()
            else:
                self.idle.append(actor)
            return name, None, _describe(error)
        self.idle.append(actor)
        return name, result, None

    def close(self) -> None:
        """Ends the actors at once, so that their room is free for the next job."""
        import ray

        for actor in [*self.idle, *(actor for actor, _ in self.awaited.values())]:
            ray.kill(actor)

    def _check_start(self, error: Any, died: bool) -> None:
        """Raises what kept an actor from starting, unless it was the death of its process and may have been chance."""
        cause = getattr(error, "cause", None)
        if isinstance(cause, UserError):
            raise cause
        self.failed_starts += 1
        if not died or self.failed_starts > self.max_retries:
            raise error


def _wait_for_nodes(config: RayConfig) -> None:
    """Waits until the cluster has as many nodes as the settings ask for; raises `UserError` when they don't come."""
    import ray

    deadline = time.monotonic() + SECONDS_FOR_NODES
    while (nodes := sum(node["Alive"] for node in ray.nodes())) < config.min_nodes:
        check(
            time.monotonic() < deadline,
            f"The Ray cluster has {nodes} nodes after {SECONDS_FOR_NODES} seconds, fewer than ray.min_nodes {config.min_nodes};"
            " look into the logs of the missing ones, or ask for less.",
        )
        time.sleep(1)


def _room_for_actors(config: RayConfig) -> int:
    """How many actors to start; raises `UserError` when not one would fit."""
    import ray

    fitting = 0
    for node in ray.nodes():
        has = node["Resources"] if node["Alive"] else {}
        room = [int(has.get("CPU", 0) // config.cpus_per_actor)]
        if config.gpus_per_actor:
            room.append(int(has.get("GPU", 0) // config.gpus_per_actor))
        fitting += min(room)
    check(
        fitting > 0,
        f"No node of the Ray cluster has ray.cpus_per_actor {config.cpus_per_actor} CPUs and ray.gpus_per_actor"
        f" {config.gpus_per_actor} GPUs for one actor; ask for less, or for larger nodes.",
    )
    return min(fitting, config.num_actors or fitting)


def _describe(error: Any) -> str:
    """The error in a line, without the trace through Ray."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:500]}"
