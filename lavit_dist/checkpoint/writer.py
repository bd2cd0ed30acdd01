"""Checkpoints that are written while training goes on: it stands still only while state is copied to host memory.

Each rank's thread writes and hashes its own files; `poll`, which the training loop calls between steps, makes the step whole once all ranks
have told that theirs are durable.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lavit_dist.checkpoint.snapshot import FileRecord, HostCopies, Snapshot, write_snapshot
from lavit_dist.checkpoint.store import CheckpointStore, Retention, read_step
from lavit_dist.checkpoint.store_copies import StoreCopies
from lavit_dist.errors import Fault
from lavit_dist.parallel.distributed import barrier, gather_objects, rank, world_size

logger = logging.getLogger(__name__)
WORTH_A_WARNING = 1.0
"""Seconds of standing still."""


@dataclass(frozen=True)
class _Pending:
    """A step that is being written."""

    step: int
    score: float | None
    started: float
    prune: bool
    files: Future[dict[str, FileRecord]]


class CheckpointWriter:
    """Writes steps into `store`, one at a time. Every method is collective, but for the properties."""

    def __init__(self, store: CheckpointStore, keep: Retention, copies: StoreCopies | None = None) -> None:
        """`copies` gets what becomes whole, where there is one, by rank 0."""
        self.store, self.keep, self.copies = store, keep, copies
        self._copies = HostCopies()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self._pruning: Future[None] | None = None
        self._begun: int | None = None
        self.whole: int | None = None
        """The last step that became whole."""

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing its part."""
        return self._pending is not None and not self._pending.files.done()

    @property
    def failed(self) -> bool:
        """Whether this rank couldn't write its part."""
        return self._pending is not None and self._pending.files.done() and self._pending.files.exception() is not None

    def begin(self, step: int, snapshot: Snapshot, score: float | None = None, *, prune: bool = True) -> None:
        """Copies `snapshot` and begins to write it as step `step`; one that is still being written is waited for.

        Once it is whole, steps that there is no reason to keep are removed, unless `prune` says otherwise.
        """
        begun = time.perf_counter()
        self.wait()
        started = time.perf_counter()
        if started - begun > WORTH_A_WARNING and rank() == 0:
            logger.warning(
                "training waited %.1f s for the checkpoint before step %d's; raise checkpoint.every_steps", started - begun, step
            )
        problem: OSError | None = None
        if rank() == 0:
            try:
                self.store.begin(step)
            except OSError as error:
                problem = error
        barrier()
        copied = self._copies.take(snapshot)
        files = self._thread.submit(_write, self.store.temporary(step), copied, problem)
        self._pending, self._begun = _Pending(step, score, started, prune, files), step

    def poll(self, *, writing: bool, failed: bool) -> None:
        """Makes the step whole, or gives it up, once no rank is `writing`; `failed` says whether one could not.

        Both must be the same on all ranks: what any of them says of itself.
        """
        if self._pending is None or writing:
            return
        pending, self._pending = self._pending, None
        problem = pending.files.exception()
        if problem is not None and not isinstance(problem, OSError):
            raise problem  # a defect, not a disk
        if failed:
            self._give_up(pending.step, str(problem) if problem else None)
            return
        records = gather_objects(pending.files.result())
        said = None
        if rank() == 0:
            try:
                files = {name: record for of_rank in records for name, record in of_rank.items()}
                folder = self.store.commit(pending.step, files, world_size(), pending.score)
                logger.info("wrote %s in %.1f s", folder, time.perf_counter() - pending.started)
            except OSError as error:
                said = str(error)
            else:
                if self.copies is not None:
                    self.copies.begin(read_step(folder))
                if pending.prune:
                    self._pruning = self._thread.submit(self._prune)
        if gather_objects(said)[0]:
            self._give_up(pending.step, said)
        else:
            self.whole = pending.step

    def finish(self) -> None:
        """Waits until what was begun last is whole. Raises `Fault` when it couldn't be written; the steps before are as they were."""
        self.wait()
        if self._begun != self.whole:
            raise Fault(
                f"Step {self._begun} could not be written to {self.store.root}; make room or mend the disk, and start the run again."
            )

    def wait(self) -> None:
        """Waits until all ranks have written what was begun, which then is whole or given up."""
        if self._pruning is not None:
            self._pruning.result()
        if self._pending is None:
            return
        failed = self._pending.files.exception() is not None  # waits
        self.poll(writing=False, failed=any(gather_objects(failed)))
        if self._pruning is not None:
            self._pruning.result()

    def _prune(self) -> None:
        try:
            self.store.prune(self.keep, spare=self.copies.needed if self.copies is not None and self.copies.busy else ())
        except OSError as error:
            logger.warning("old checkpoints couldn't be removed: %s", error)

    def _give_up(self, step: int, problem: str | None) -> None:
        """Says why, on the rank that knows, and removes what was written."""
        if problem is not None:
            logger.error(
                "step %d couldn't be written to %s (%s); training goes on, and the checkpoints before it are as they were",
                step,
                self.store.root,
                problem,
            )
        barrier()
        if rank() == 0:
            self.store.remove_unfinished()


def _write(folder: Path, snapshot: Snapshot, problem: OSError | None) -> dict[str, FileRecord]:
    if problem is not None:
        raise problem
    return write_snapshot(folder, snapshot)
