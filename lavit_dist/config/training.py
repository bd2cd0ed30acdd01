"""Settings that every training stage shares: optimizer and schedule, checkpoints, logging, process settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from lavit_dist.config.base import config
from lavit_dist.errors import check

Decay = Annotated[float, Field(ge=0, lt=1)]
Schedule = Literal["cosine", "wsd", "constant"]
"""What the learning rate does after the warm-up: falls by half a cosine; stays, then falls (warm-up, stable, decay); or stays."""
DECAY_SETTINGS: dict[str, tuple[Schedule, ...]] = {
    "min_learning_rate": ("cosine", "wsd"),
    "decay_share": ("wsd",),
    "decay_shape": ("wsd",),
}
"""Settings of the optimizer that only some schedules have a use for."""


@config
class OptimizerConfig:
    """AdamW, or Muon beside it, with a warm-up and a decay."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon` takes Muon for the matrices of transformer blocks and for the matrices and kernels of a U-Net's blocks, and AdamW for
    the rest; it needs each whole on its rank, so the language model, which shards them, does not offer it."""
    implementation: Literal["auto", "torch", "apex", "deepspeed"] = "auto"
    """Whose AdamW: `auto` is apex's FusedAdam on a GPU where apex is installed, else torch's fused one, which nothing has to be compiled
    for; `deepspeed` compiles its own at first use. Their states differ in form, so a run resumes where `auto` means the same. 8-bit
    optimizers aren't offered: no library here has one that ZeRO can shard."""
    learning_rate: PositiveFloat = 3e-4
    """Peak learning rate of AdamW."""
    muon_learning_rate: PositiveFloat = 0.02
    """Peak learning rate of Muon (Jordan et al. 2024)."""
    muon_weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay of the matrices that Muon moves."""
    min_learning_rate: float = 0.0
    """Learning rate that the decay reaches after the last step, which itself is still a little above it."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from zero."""
    schedule: Schedule = "cosine"
    """Shape of the decay after the warm-up."""
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """`wsd`: share of the steps, at the end, over which the learning rate falls (Hägele et al. 2024)."""
    decay_shape: Literal["linear", "1-sqrt"] = "1-sqrt"
    """`wsd`: how it falls; 1-sqrt falls fast at first, and came out best there."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay rates of Adam's averages."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay, applied to matrices only (not to norms, biases or tables of positions)."""
    gradient_clipping: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    def validate(self) -> None:
        check(
            self.name == "adamw" or self.implementation in ("auto", "torch"),
            f"optimizer.implementation {self.implementation} is of AdamW alone, but optimizer.name is {self.name}, beside which torch's"
            " AdamW runs; set optimizer.implementation to auto, or optimizer.name to adamw.",
        )
        check(
            0 <= self.min_learning_rate <= self.learning_rate,
            f"optimizer.min_learning_rate {self.min_learning_rate} must lie between 0 and learning_rate {self.learning_rate}.",
        )

    def decay_start(self, total_steps: int) -> int:
        """The first step, from 0, of the fall that the schedule of `total_steps` ends with; it is itself still at the peak."""
        if self.schedule == "wsd":
            return max(self.warmup_steps, total_steps - max(1, round(self.decay_share * total_steps)))
        return self.warmup_steps


def check_schedules(schedules: Mapping[str, tuple[OptimizerConfig, int]]) -> None:
    """Checks the schedules of one run, which share min_learning_rate and decay_*: each is given by the setting of its steps, with them.

    Raises `UserError` when a `wsd` never falls, or when no schedule has a use for a setting that was given.
    """
    for setting, (optimizer, steps) in schedules.items():
        falling = max(0, steps - optimizer.decay_start(steps))
        check(
            optimizer.schedule != "wsd" or falling >= 2,
            f"{setting} {steps} with optimizer.decay_share {optimizer.decay_share} and a warm-up of {optimizer.warmup_steps} leaves the"
            f" schedule wsd fewer than 2 steps to fall in, the first of which is at the peak; raise {setting} or optimizer.decay_share,"
            " or choose the schedule cosine.",
        )
    kinds = {optimizer.schedule for optimizer, _ in schedules.values()}
    optimizer, _ = next(iter(schedules.values()))
    for name, users in DECAY_SETTINGS.items():
        given = getattr(optimizer, name)
        check(
            given == getattr(OptimizerConfig(), name) or not kinds.isdisjoint(users),
            f"optimizer.{name} {given} has no meaning with the schedule {' or '.join(sorted(kinds))}; leave it out, or set"
            f" optimizer.schedule to {' or '.join(users)}.",
        )


@config
class CheckpointConfig:
    """When checkpoints are written and which are kept; a run always resumes from the newest good one in its run folder."""

    every_steps: int = 1000
    """Steps between checkpoints; the last step always writes one, and so does a run that is asked to stop."""
    asynchronous: bool = True
    """Write while training goes on: it stands still while state is copied to host memory, which must have room for it."""
    keep_last: int = 2
    """How many of the newest checkpoints to keep; those before it are there if the newest is damaged."""
    keep_every: NonNegativeInt = 0
    """Keep for good those whose step is a multiple of this; 0 keeps none for that."""
    keep_best: NonNegativeInt = 0
    """Keep as many of those with the lowest mean loss since the checkpoint before."""
    copy_to: str | None = None
    """URL below which checkpoints are copied in the background, and kept alike, such as s3://bucket/run: any that fsspec reaches. `launcher/checkpoint.py
    fetch` gets the newest back."""
    storage_options: dict[str, str | int | float | bool | None] = field(default_factory=dict)
    """What fsspec's file system of `copy_to` is opened with, such as `endpoint_url`; credentials belong into its own files."""

    def validate(self) -> None:
        check(self.every_steps > 0, f"checkpoint.every_steps {self.every_steps} must be at least 1.")
        check(self.keep_last > 0, f"checkpoint.keep_last {self.keep_last} must be at least 1.")
        check(
            self.keep_every % self.every_steps == 0,
            f"checkpoint.keep_every {self.keep_every} is not a multiple of checkpoint.every_steps {self.every_steps}, so that few of the"
            f" steps it names are ever written; choose {max(1, round(self.keep_every / self.every_steps)) * self.every_steps}.",
        )


@config
class FaultsConfig:
    """What a run does about numbers that go wrong and ranks that hang."""

    bad_steps: PositiveInt = 8
    """After how many steps in a row whose gradient isn't finite, or whose loss is a spike, the run goes back to the checkpoint before
    them and leaves out the batches since. A step whose gradient isn't finite is never taken: its batch is skipped."""
    roll_backs: NonNegativeInt = 3
    """How often a run goes back before it gives up."""
    spike_deviations: NonNegativeFloat = 0.0
    """A loss is a spike when it lies so many standard deviations above the mean of the steps before (PaLM's runs were set back by hand
    for it); 0 looks for none. 6 is rarely seen by chance."""
    spike_window: Annotated[int, Field(ge=8)] = 128
    """Over how many steps mean and deviation are taken."""
    hang_seconds: Annotated[float, Field(gt=0, le=1e6)] = 1800.0
    """How long a step, a save or a collective may take before the run is ended, with a record of what each rank was doing, so that it can
    be started again. Compilation in the first step counts."""


@config
class LoggingConfig:
    """What a run reports while it goes."""

    every_steps: int = 10
    """Steps between log lines; metrics of every step go to metrics.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard files under RUN_DIR/tensorboard."""

    def validate(self) -> None:
        check(self.every_steps > 0, f"logging.every_steps {self.every_steps} must be at least 1.")


@config
class ChecksConfig:
    """How often a run looks whether its ranks still agree (engine/checks.py); `checks: true` is every 100 steps."""

    every_steps: NonNegativeInt = 0
    """Steps between checks, which are also made at the start and after loading; 0 makes none."""


def _switch(given: Any) -> Any:
    """`true` and `false` as what they stand for."""
    return {"every_steps": 100 if given else 0} if isinstance(given, bool) else given


Checks = Annotated[ChecksConfig, BeforeValidator(_switch)]
"""The type of the setting `checks`: a switch, or a cadence."""
