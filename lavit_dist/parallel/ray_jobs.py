"""Independent named jobs on Ray actors that each load their models once.

Progress is keyed on jobs, never on Ray's blocks: what a job produces lies in files that it commits itself, so a run that is killed
loses at most the jobs that were being done.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from lavit_dist.config.ray import RayConfig
from lavit_dist.errors import UserError
from lavit_dist.files import is_disk_full
from lavit_dist.parallel.ray_cluster import check_room, room_for

logger = logging.getLogger(__name__)
MAX_DEATHS = 10
"""How often a job is begun again because its actor died, which is mostly the fault of a node and not of the job."""
SECONDS_BETWEEN_LOOKS = 10.0
"""How often it is looked whether the cluster has grown."""
SECONDS_BETWEEN_REPORTS = 2.0
SECONDS_TO_STOP = 5.0
SECONDS_TO_PLACE = 0.5
"""How long Ray may take to give an actor the room that another has left."""
MAX_FAILING = 2
"""After errors in so many different jobs on end an actor is replaced: more likely than they it is out of order."""
LONGEST_PAUSE = 6
"""Doublings of the time until an actor that could not start is tried again."""


class Worker(Protocol):
    """What an actor runs. Its constructor only keeps its arguments: errors in it are reported less well than those of `start`."""

    def start(self) -> None:
        """Loads what every job needs."""

    def run(self, job: Any) -> Any:
        """Does one job and returns a small description of it. Called by several threads if `jobs_at_a_time` is above 1."""

    def stop(self) -> None:
        """Lets go of what would outlive the process."""


class ReportingWorker(Worker, Protocol):
    """A worker that can be asked how far it is, by another thread."""

    def progress(self) -> Any:
        """What it has done so far."""


@dataclass(frozen=True)
class Outcome:
    """The end of a job."""

    name: str
    result: Any
    """What `Worker.run` returned; None if it failed."""
    error: str | None
    """The last error, after all retries; None if it succeeded."""


@dataclass(frozen=True)
class Share:
    """What of a node each actor takes, together with the helpers that it starts."""

    cpus: float
    gpus: float = 0.0
    jobs_at_a_time: int = 1
    """With 2, an actor has work while it begins or ends a job."""


def run_jobs(
    worker: type[Worker],
    arguments: tuple[Any, ...],
    jobs: Mapping[str, Any],
    config: RayConfig,
    share: Share | None = None,
    report: Callable[[dict[Any, Any], int], None] | None = None,
) -> Iterator[Outcome]:
    """Runs every job on actors made by `worker(*arguments)` and yields their outcomes as they end, within `ray_cluster`.

    There are as many actors as the cluster has room for, or `config.num_actors`; more are started as nodes join. A job that raises is
    tried again `max_retries` times, if possible on another actor; one whose actor dies `MAX_DEATHS` times. An actor that fails job after
    job is replaced. An actor is given a job only when it is up, so actors that the cluster has no room for, or that can't start while
    others work, hold nothing up. Raises `UserError` for a full disk, and what `start` raises as long as no actor works.

    `report`, for a `ReportingWorker`, is called every few seconds with what each actor last said, and how many are up.
    """
    waiting = deque(jobs)
    failures: Counter[str] = Counter()
    deaths: Counter[str] = Counter()
    left = len(jobs)
    with closing(_ActorPool(worker, arguments, config, share or Share(config.cpus_per_actor, config.gpus_per_actor))) as pool:
        while left:
            pool.grow(len(waiting))
            for name, result, error, died in pool.next_events():
                if error is None:
                    left -= 1
                    yield Outcome(name, result, None)
                    continue
                (deaths if died else failures)[name] += 1
                logger.warning("%s failed (%d errors, %d deaths so far): %s", name, failures[name], deaths[name], error)
                if failures[name] <= config.max_retries and deaths[name] <= MAX_DEATHS:
                    waiting.append(name)
                else:
                    left -= 1
                    yield Outcome(name, None, error)
            while waiting and pool.free:
                name = waiting.popleft()
                pool.give(name, jobs[name])
            if report is not None:
                pool.report(report, last=not left)


@dataclass(eq=False)
class _Actor:
    handle: Any
    group: Any
    up: bool = False
    jobs: int = 0
    failing: set[str] = field(default_factory=set)
    """Jobs that have raised since one succeeded."""


class _ActorPool:
    """Actors of one kind; one that dies is replaced."""

    def __init__(self, worker: type[Worker], arguments: tuple[Any, ...], config: RayConfig, share: Share) -> None:
        import ray

        self.arguments, self.config, self.share, self.failed_starts = arguments, config, share, 0
        self.remote_class: Any = ray.remote(worker)
        self.actors: list[_Actor] = []
        self.awaited: dict[Any, tuple[_Actor, str | None]] = {}
        """The actor behind each result that is awaited, and the name of its job, or None for its start."""
        self.said: dict[Any, Any] = {}
        """What each actor, living or dead, last reported."""
        self.asked: dict[Any, _Actor] = {}
        self.next_look = self.next_report = 0.0

    @property
    def free(self) -> bool:
        """Whether an actor could take a job."""
        return any(actor.up and actor.jobs < self.share.jobs_at_a_time for actor in self.actors)

    def grow(self, waiting: int) -> None:
        """Starts the actors that the cluster now has room for, as long as there is work for them. At first there must be room for one."""
        now = time.monotonic()
        if now < self.next_look:
            return
        room = self.config.num_actors or room_for(self.share.cpus, self.share.gpus)
        if not self.next_look and not (self.config.num_actors and self.config.address):  # else the cluster is asked to grow
            check_room(self.share.cpus, self.share.gpus)
        self.next_look = now + SECONDS_BETWEEN_LOOKS
        idle = sum(not actor.jobs for actor in self.actors)
        for _ in range(min(room - len(self.actors), waiting - idle)):
            self._add_actor()

    def give(self, name: str, job: Any) -> None:
        """Gives a job to the actor that has the least to do, and if possible has not failed it."""
        able = (actor for actor in self.actors if actor.up and actor.jobs < self.share.jobs_at_a_time)
        actor = min(able, key=lambda actor: (name in actor.failing, actor.jobs))
        actor.jobs += 1
        self.awaited[actor.handle.run.remote(job)] = (actor, name)

    def next_events(self) -> Iterator[tuple[str, Any, str | None, bool]]:
        """Waits a while for jobs to end or actors to come up: of each job its name, result, error, and whether its actor died."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        wait = SECONDS_BETWEEN_REPORTS if self.awaited else SECONDS_BETWEEN_LOOKS
        if not self.awaited:
            time.sleep(wait)
            return
        done, _ = ray.wait(list(self.awaited), num_returns=1, timeout=wait)
        for ref in done:
            actor, name = self.awaited.pop(ref)
            try:
                result = ray.get(ref)
            except RayError as error:
                # What `run` raised is a RayTaskError, beside being of its own class, which may be that of a helper's death.
                died = not isinstance(error, RayTaskError)
                if name is None:
                    self._failed_start(actor, error, died)
                    continue
                _check_disk(name, error)
                actor.jobs -= 1
                actor.failing.add(name)
                if died or len(actor.failing) >= MAX_FAILING:
                    self._replace(actor)
                yield name, None, _describe(error), died
                continue
            if name is None:
                actor.up, self.failed_starts = True, 0
            else:
                actor.jobs -= 1
                actor.failing.clear()
                yield name, result, None, False

    def report(self, tell: Callable[[dict[Any, Any], int], None], *, last: bool = False) -> None:
        """Takes up what actors have said since the last time, tells it, and asks again; or the `last` time, asks and waits."""
        now = time.monotonic()
        if now < self.next_report and not last:
            return
        self.next_report = now + SECONDS_BETWEEN_REPORTS
        if not last:
            self._hear(timeout=0)
        waiting_for = set() if last else set(self.asked.values())
        self.asked |= {actor.handle.progress.remote(): actor for actor in self.actors if actor.up and actor not in waiting_for}
        if last:
            self._hear(timeout=SECONDS_TO_STOP)
        tell(self.said, sum(actor.up for actor in self.actors))

    def _hear(self, timeout: float) -> None:
        import ray
        from ray.exceptions import RayError

        answered, _ = ray.wait(list(self.asked), num_returns=len(self.asked), timeout=timeout) if self.asked else ([], [])
        for ref in answered:
            actor = self.asked.pop(ref)
            with suppress(RayError):  # of one that died; its jobs will tell
                self.said[actor] = ray.get(ref)

    def close(self) -> None:
        """Ends the actors, so that their room is free for the next job; at once, but for those that have nothing to do."""
        import ray

        stopping = [actor.handle.stop.remote() for actor in self.actors if actor.up and not actor.jobs]
        if stopping:
            ray.wait(stopping, num_returns=len(stopping), timeout=SECONDS_TO_STOP)
        # Ray loses the room of a group that is removed while it is being given it: what is under way is waited for, and those that
        # get none go before others leave theirs.
        if any(map(_awaits_room, self.actors)):
            time.sleep(SECONDS_TO_PLACE)
        for actor in sorted(self.actors, key=_awaits_room, reverse=True):
            self._end(actor)

    def _add_actor(self) -> None:
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        has = {"CPU": self.share.cpus, "GPU": self.share.gpus}
        group = placement_group([{name: amount for name, amount in has.items() if amount}])
        actor = self.remote_class.options(
            num_cpus=self.config.cpus_per_actor,
            num_gpus=self.share.gpus,
            max_concurrency=self.share.jobs_at_a_time + 1,  # and one for reports
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True),
        ).remote(*self.arguments)
        self.actors.append(_Actor(actor, group))
        self.awaited[actor.start.remote()] = (self.actors[-1], None)

    def _replace(self, actor: _Actor) -> None:
        """Starts another in place of one that is dead or out of order; what else that was doing is told by its own events."""
        if actor in self.actors:
            self.actors.remove(actor)
            self._end(actor)
            self._add_actor()

    def _end(self, actor: _Actor) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        ray.kill(actor.handle)
        remove_placement_group(actor.group)

    def _failed_start(self, actor: _Actor, error: Any, died: bool) -> None:
        """Lets go of an actor that couldn't start, and tries again after a while.

        Raises what kept it from starting where no other works: at once what it raised, and after `MAX_DEATHS` the death of its process.
        """
        self.failed_starts += 1
        if not any(other.up for other in self.actors) and (not died or self.failed_starts > MAX_DEATHS):
            cause = getattr(error, "cause", None)
            raise cause if isinstance(cause, UserError) else error
        logger.warning("an actor could not be started: %s", _describe(error))
        if actor in self.actors:
            self.actors.remove(actor)
            self._end(actor)
        pause = SECONDS_BETWEEN_LOOKS * 2 ** min(self.failed_starts - 1, LONGEST_PAUSE)
        self.next_look = time.monotonic() + (pause if any(other.up for other in self.actors) else 0)


def _awaits_room(actor: _Actor) -> bool:
    from ray.util.placement_group import placement_group_table

    return bool(placement_group_table(actor.group)["state"] != "CREATED")


def _check_disk(name: str | None, error: Any) -> None:
    """Raises `UserError` where there is no room to write: other jobs would compute in vain."""
    cause = getattr(error, "cause", None)
    if cause is not None and is_disk_full(cause):
        raise UserError(
            f"{name} could not be written: {cause.strerror} ({cause.filename}); make room and run this again, what is finished is kept."
        ) from None


def _describe(error: Any) -> str:
    """The error in a line, without the trace through Ray."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:500]}"
