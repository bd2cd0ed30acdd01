"""The training loop: one for every stage. What is trained and what is watched are its two arguments."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from lavit_dist.checkpoint.store import CheckpointStore
from lavit_dist.config.training import CheckpointConfig
from lavit_dist.errors import UserError, check
from lavit_dist.parallel.distributed import world_size

logger = logging.getLogger(__name__)


class Trainable(Protocol):
    """Something that can be trained step by step, saved and continued exactly. Every method is collective over all ranks."""

    def train_step(self, step: int) -> Mapping[str, float]:
        """Takes optimizer step `step` (from 0) and returns its metrics, equal on every rank that reports them."""

    def save(self, folder: Path) -> None:
        """Writes everything that the next step depends on into `folder`."""

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""


class Callback:
    """Watches a run. Every method may be overridden; the loop calls them on every rank, in order."""

    def on_start(self, start_step: int, total_steps: int) -> None:
        """Before step `start_step`, which is above 0 in a resumed run."""

    def after_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """After `step` optimizer steps in all; `metrics` holds the trainable's figures and `seconds`, the step's wall time."""

    def on_end(self) -> None:
        """After the last step and its checkpoint."""


def run_training(
    trainable: Trainable,
    *,
    total_steps: int,
    store: CheckpointStore,
    checkpoint: CheckpointConfig,
    callbacks: Sequence[Callback] = (),
    any_ranks: bool = False,
) -> None:
    """Trains from the newest good checkpoint in `store`, or from step 0, to `total_steps`, writing checkpoints on the way.

    `any_ranks`: what another number of processes wrote can be loaded.
    """
    step = 0
    newest = store.latest()
    if newest is not None:
        check(
            any_ranks or newest.ranks == world_size(),
            f"The checkpoint {newest.folder} was written by {newest.ranks} processes, but {world_size()} were started; start"
            f" {newest.ranks}, or train in another run_dir.",
        )
        step = newest.step
        trainable.load(newest.folder)
        logger.info("resumed from %s, step %d of %d", newest.folder, step, total_steps)
    for callback in callbacks:
        callback.on_start(step, total_steps)
    while step < total_steps:
        start = time.perf_counter()
        metrics = dict(trainable.train_step(step))
        _check_finite(step, metrics)
        metrics["seconds"] = time.perf_counter() - start
        step += 1
        for callback in callbacks:
            callback.after_step(step, metrics)
        if step % checkpoint.every_steps == 0 or step == total_steps:
            store.save(step, trainable.save)
            store.prune(checkpoint.keep_last)
    for callback in callbacks:
        callback.on_end()


def _check_finite(step: int, metrics: Mapping[str, float]) -> None:
    for name in ("loss", "grad_norm"):
        if not math.isfinite(metrics.get(name, 0.0)):
            raise UserError(
                f"The {name} of step {step + 1} is {metrics[name]}, so training stops before it is saved; lower"
                " optimizer.learning_rate or lengthen optimizer.warmup_steps, and train in a new run_dir."
            )
