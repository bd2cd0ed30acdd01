"""The training loop: one for every stage. What is trained and what is watched are its arguments; faults are dealt with here alone."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import math
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from lavit_dist.checkpoint.snapshot import Snapshot
from lavit_dist.checkpoint.store import CheckpointStore, Retention, SavedStep
from lavit_dist.checkpoint.store_copies import StoreCopies
from lavit_dist.checkpoint.writer import CheckpointWriter
from lavit_dist.config.base import to_dict, without_secrets
from lavit_dist.config.training import CheckpointConfig, FaultsConfig
from lavit_dist.engine.events import record_event
from lavit_dist.engine.step_guard import StepGuard
from lavit_dist.engine.stop_request import StopRequest
from lavit_dist.engine.watchdog import Watchdog
from lavit_dist.errors import UserError, check
from lavit_dist.files import read_json
from lavit_dist.parallel.distributed import device, rank, set_timeouts, world_size
from lavit_dist.parallel.outside_faults import outside_faults_told

logger = logging.getLogger(__name__)
LOOP_FILE = "loop.json"
"""What the loop itself must know to go on, in a step folder."""
ABOUT_FILE = "about.json"
"""The settings and the versions of a step, for who wonders."""
PACKAGES = ("lavit_dist", "torch", "deepspeed", "megatron-core", "transformers", "diffusers")
COPY_POLL_SECONDS = 0.5


class Trainable(Protocol):
    """Something that can be trained step by step, saved and continued exactly. Every method is collective over all ranks."""

    memory_advice: str
    """A sentence that says which settings to change when memory runs out."""

    @property
    def batches_read(self) -> int:
        """How many batches of the data were used or left out until now."""

    def train_step(self, step: int) -> Mapping[str, float]:
        """Takes optimizer step `step` (from 0) and returns its metrics, `loss` and `grad_norm` among them, equal on all ranks.

        A step whose gradient isn't finite must leave everything as it was but for the place in the data.
        """

    def snapshot(self) -> Snapshot:
        """Everything that the next step depends on: this rank's part of it."""

    def load(self, folder: Path) -> None:
        """Restores what all ranks' snapshots held, whatever the number of ranks that wrote them."""

    def skip_batches(self, count: int) -> None:
        """Leaves out the next `count` batches of the data."""


class Callback:
    """Watches a run. Every method may be overridden; the loop calls them on every rank, in order."""

    def on_start(self, start_step: int, total_steps: int) -> None:
        """Before step `start_step`, which is above 0 in a resumed run; also when the run has gone back to it."""

    def after_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """After `step` optimizer steps in all; `metrics` holds the trainable's figures and `seconds`, the step's wall time."""

    def on_end(self) -> None:
        """After the last step and its checkpoint, or when the run stops before it."""


def run_training(
    trainable: Trainable,
    *,
    run_dir: Path,
    total_steps: int,
    checkpoint: CheckpointConfig,
    faults: FaultsConfig,
    config: Any,
    callbacks: Sequence[Callback] = (),
) -> bool:
    """Trains from the newest good checkpoint under RUN_DIR/checkpoints, or from step 0, to `total_steps`, writing checkpoints on the way.

    `config` is what the run was started with; checkpoints tell of it. Returns whether it got there: False when it was asked to stop (see `StopRequest`), after a checkpoint was written. Raises `UserError`
    when numbers go wrong again and again, and `Fault` for what failed outside of the program.
    """
    return _Run(trainable, run_dir, total_steps, checkpoint, faults, config, callbacks).train()


class _Run:
    def __init__(
        self,
        trainable: Trainable,
        run_dir: Path,
        total_steps: int,
        checkpoint: CheckpointConfig,
        faults: FaultsConfig,
        config: Any,
        callbacks: Sequence[Callback],
    ) -> None:
        self.trainable, self.run_dir, self.total_steps = trainable, run_dir, total_steps
        self.checkpoint, self.faults, self.callbacks = checkpoint, faults, callbacks
        self.store = CheckpointStore(run_dir / "checkpoints")
        keep = Retention(checkpoint.keep_last, checkpoint.keep_every, checkpoint.keep_best)
        to_store = checkpoint.copy_to is not None and rank() == 0
        self.copies = StoreCopies(checkpoint.copy_to or "", checkpoint.storage_options, keep) if to_store else None
        self.writer = CheckpointWriter(self.store, keep, self.copies)
        self.guard = StepGuard(faults)
        settings = without_secrets(to_dict(config))
        settings.pop("run_dir", None)  # where a run lies is no part of what it is
        self.about = {"config": settings, "versions": versions()}
        self.losses: list[float] = []
        """Of the steps since the last checkpoint."""

    def train(self) -> bool:
        with (
            StopRequest(self.run_dir) as self.stop,
            Watchdog(self.run_dir, self.faults.hang_seconds) as self.watchdog,
        ):
            step = first = self._start()
            while not (stopping := self._between_steps()) and step < self.total_steps:
                step = self._step(step)
                if self.guard.must_go_back:
                    step = self._go_back(step)
                elif step == self.total_steps or (step % self.checkpoint.every_steps == 0 and not self.guard.bad):
                    self._save(step)
            self.watchdog.beat(step, "saving")
            with self._told("while the last checkpoint was written"):
                self.writer.wait()
                if step != (first if self.writer.whole is None else self.writer.whole):
                    self._save(step)
                self.writer.finish()
                while _any_rank([self.copies is not None and self.copies.busy])[0]:
                    self.watchdog.beat(step, "copying the last checkpoint")
                    time.sleep(COPY_POLL_SECONDS)
            for callback in self.callbacks:
                callback.on_end()
            done = step == self.total_steps
            self._record("done" if done else "stopped", step)
            if stopping:
                self.stop.honoured()
            if not done:
                logger.info("stopped after step %d of %d, as asked; start the run again to go on", step, self.total_steps)
            return done

    def _start(self) -> int:
        """The step to go on from, with everything as it was then."""
        set_timeouts(self.faults.hang_seconds)
        self.watchdog.beat(0, "loading a checkpoint")
        if rank() == 0:
            self.store.remove_unfinished()
        with self._told("at its start"):
            newest = self.store.latest()
            step = 0 if newest is None else self._load(newest)
        if newest is not None:
            logger.info("resumed from %s, step %d of %d", newest.folder, step, self.total_steps)
        for callback in self.callbacks:
            callback.on_start(step, self.total_steps)
        self._record("started", step, ranks=world_size(), torch=torch.__version__)
        return step

    def _load(self, saved: SavedStep) -> int:
        self.trainable.load(saved.folder)
        path = saved.folder / LOOP_FILE
        check(path.exists(), f"{saved.folder} has no {LOOP_FILE}: an earlier version wrote it; train in another run_dir.")
        self.guard.load_state_dict(read_json(path, "resume from an earlier step", self.guard.state_dict()))
        self.losses = []
        return saved.step

    def _between_steps(self) -> bool:
        """Whether any rank was asked to stop; on the way a checkpoint that all ranks have written becomes whole."""
        mine = (self.stop.requested, self.writer.writing, self.writer.failed)
        with self._told("between two steps"):
            stopping, writing, failed = _any_rank(mine)
            self.writer.poll(writing=writing, failed=failed)
        return stopping

    def _step(self, step: int) -> int:
        """Takes a step, and tells of it."""
        self.watchdog.beat(step, "training")
        start = time.perf_counter()
        with self._told(f"in step {step + 1}", retry=step > 0):
            metrics = dict(self.trainable.train_step(step))
        metrics["seconds"] = time.perf_counter() - start
        step += 1
        problem = self.guard.judge(metrics)
        if problem:
            self._warn("step %d went wrong: %s (%d in a row)", step, problem, self.guard.bad)
            self._record("bad step", step, problem=problem)
        if self.guard.skipped:
            metrics["steps_skipped"] = float(self.guard.skipped)
        if math.isfinite(metrics.get("loss", 0.0)):
            self.losses.append(metrics.get("loss", 0.0))
        for callback in self.callbacks:
            callback.after_step(step, metrics)
        return step

    def _save(self, step: int) -> None:
        self.watchdog.beat(step, "saving")
        score = statistics.fmean(self.losses) if self.losses else None
        with self._told("while a checkpoint was written"):
            snapshot = self.trainable.snapshot()
            if rank() == 0:
                snapshot |= Snapshot(objects={LOOP_FILE: self.guard.state_dict(), ABOUT_FILE: self.about})
            # What is to be gone back to, should a bad stretch go on, must stay.
            self.writer.begin(step, snapshot, score, prune=not self.guard.bad)
            if not self.checkpoint.asynchronous:
                self.writer.wait()
        self.losses = []

    def _go_back(self, step: int) -> int:
        """Loads the newest checkpoint from before the bad steps; their batches, and those since it, are left out from now on."""
        bad, roll_backs = self.guard.bad, self.guard.roll_backs + 1
        if roll_backs > self.faults.roll_backs:
            raise UserError(
                f"The last {bad} steps until step {step} went wrong after the run had gone back {self.faults.roll_backs} times"
                " (faults.roll_backs); lower optimizer.learning_rate or lengthen optimizer.warmup_steps, and train in a new run_dir."
            )
        self.watchdog.beat(step, "going back")
        with self._told("while it went back"):
            self.writer.wait()
            saved = self.store.latest(until=step - bad)
            check(
                saved is not None,
                f"The first steps went wrong, {bad} in a row until step {step}, and there is no checkpoint to go back to; lower"
                " optimizer.learning_rate or lengthen optimizer.warmup_steps, and train in a new run_dir.",
            )
            assert saved is not None
            skipped, read = self.guard.skipped, self.trainable.batches_read
            self._load(saved)
            self.guard.skipped, self.guard.roll_backs = skipped, roll_backs - 1
            self.guard.went_back()
            # All that was read after the checkpoint, in an earlier roll-back from the same one, too.
            left_out = read - self.trainable.batches_read
            self.trainable.skip_batches(left_out)
            if rank() == 0:
                self.store.go_back_to(saved)
            self._save(saved.step)  # so that neither a stop nor a crash forgets what is left out
            self.writer.wait()
        self._warn("went back from step %d to %s; the %d batches since then are left out", step, saved.folder.name, left_out)
        self._record("went back", step, to=saved.step)
        for callback in self.callbacks:
            callback.on_start(saved.step, self.total_steps)
        return saved.step

    def _told(self, doing: str, *, retry: bool = True) -> Any:
        return outside_faults_told(doing, advice=self.trainable.memory_advice, retry=retry)

    def _warn(self, message: str, *values: object) -> None:
        """Says once what all ranks find."""
        if rank() == 0:
            logger.warning(message, *values)

    def _record(self, event: str, step: int, **details: Any) -> None:
        if rank() == 0:
            record_event(self.run_dir, event, step, **details)


def versions() -> dict[str, str]:
    """Of Python and of what decides numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _any_rank(mine: Sequence[bool]) -> list[bool]:
    """Of each of these, whether it holds on any rank: one small collective."""
    if world_size() == 1:
        return list(mine)
    flags = torch.tensor(mine, dtype=torch.int32, device=device())
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]
