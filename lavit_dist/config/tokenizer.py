"""Settings of visual tokenizer training."""

from __future__ import annotations

from dataclasses import field, replace
from itertools import pairwise
from typing import Annotated, Literal, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from lavit_dist.config.base import Seed, config
from lavit_dist.config.images import ImagesConfig
from lavit_dist.config.model import CodebookConfig, MergerConfig, TokenizerDecoderConfig, VisionEncoderConfig, VisualTokenizerConfig
from lavit_dist.config.tokenizer_health import TokenizerHealthConfig
from lavit_dist.config.training import CheckpointConfig, FaultsConfig, LoggingConfig, OptimizerConfig, Schedule, check_schedules
from lavit_dist.errors import check

Part = Literal["selector", "merger", "projection", "codebook", "decoder"]
"""What a phase may train, by the official keys: `token_predictor`, `causal_encoder`, `encode_task_layer`, `quantize`, and
the whole of `tokenizer_decoder.bin`. The codebook follows its moving averages, or gradients if `codebook.learning` says so."""
PARTS: tuple[Part, ...] = get_args(Part)


@config
class PhaseConfig:
    """A stretch of training in which the same parts learn. Each has its own optimizer state and learning-rate schedule."""

    steps: PositiveInt
    """Optimizer steps."""
    train: tuple[Part, ...] = PARTS
    """The parts that learn; the others stay as they are."""
    quantize: bool
    """Whether the decoder reads codes; False gives it the unit vectors before quantization."""
    selection: Literal["gumbel", "argmax", "random"] = "gumbel"
    """How patches are kept: the selector's Gumbel samples, as released; its arg-max; or at random at the target keep ratio."""
    selector_signal: Literal["straight_through", "reconstruction_error"] = "straight_through"
    """What a selector that learns does so from. `straight_through` is Eq. 1's gradient and Eq. 4's rate term, as in the paper; in a few
    hundred steps it is noise. `reconstruction_error` teaches it which of the dropped patches come back worst (see `guidance_loss`)."""
    calibrate_selector: bool = False
    """Before the first step, shift the selector's bias so that it keeps the target share of patches."""
    initialise_codebook: bool | None = None
    """Before the first step, set the codebook by k-means; None does so where the quantizer comes on, unless `codebook.initialisation`
    is `random`."""
    gumbel_temperature: PositiveFloat = 1.0
    """Temperature of Eq. 1 at the first step (1 as in the released code)."""
    final_gumbel_temperature: PositiveFloat | None = None
    """Temperature at the last step, approached geometrically; None keeps the first."""
    learning_rate_scale: PositiveFloat = 1.0
    """Factor of every peak learning rate."""
    part_learning_rate_scales: dict[Part, PositiveFloat] = field(default_factory=dict)
    """Further factors by part."""
    schedule: Schedule | None = None
    """Shape of the decay; None takes `optimizer.schedule`."""
    warmup_steps: NonNegativeInt | None = None
    """Steps of linear warm-up; None takes `optimizer.warmup_steps`."""

    @property
    def straight_through(self) -> bool:
        """Whether gradients flow through the selection."""
        return "selector" in self.train and self.selector_signal == "straight_through"


@config
class RateConfig:
    """How many patches to keep: the second term of Eq. 4, and what readings it admits."""

    keep_ratio: Annotated[float, Field(gt=0, lt=1)] = 1 / 3
    """Share of patches to keep, rho in Eq. 4."""
    weight: NonNegativeFloat = 2.0
    """Weight of the term, lambda in Eq. 4."""
    per: Literal["batch", "image", "range"] = "batch"
    """What must meet `keep_ratio`: the mean over a global batch, so that images may differ; or each image; or `range`, where an
    image's share is free between `lowest` and `highest`, besides the batch's mean."""
    lowest: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Smallest share of an image for `per: range`."""
    highest: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Largest share of an image for `per: range`."""

    def validate(self) -> None:
        check(
            self.per != "range" or self.lowest < self.keep_ratio < self.highest,
            f"rate.keep_ratio {self.keep_ratio} must lie between rate.lowest {self.lowest} and rate.highest {self.highest}.",
        )


def default_phases() -> dict[str, PhaseConfig | None]:
    """50,000 steps as in the paper: the authors' first account of their order (official issue 10)."""
    return {
        "selection": PhaseConfig(
            steps=20_000,
            train=("selector", "merger", "projection", "decoder"),
            quantize=False,
            selection="random",
            selector_signal="reconstruction_error",
            schedule="constant",
        ),
        "quantization": PhaseConfig(
            steps=30_000, train=("merger", "projection", "codebook", "decoder"), quantize=True, calibrate_selector=True
        ),
    }


@config
class TrainTokenizerConfig:
    """Trains selector, merger, quantizer and decoder on the features of a frozen tower (Eq. 4 of the paper)."""

    run_dir: str
    """Folder of the run."""
    images: ImagesConfig
    """The pictures, and how they are read."""
    tower: str
    """Folder that holds visual_tokenizer/eva_vitg_psz14.bin, the frozen vision tower."""
    initial: str | None = None
    """Folder of a visual tokenizer of the same sizes to go on from; None starts with new weights."""
    encoder: VisionEncoderConfig = VisionEncoderConfig()
    merger: MergerConfig = MergerConfig()
    codebook: CodebookConfig = CodebookConfig()
    decoder: TokenizerDecoderConfig = TokenizerDecoderConfig()
    phases: dict[str, PhaseConfig | None] = field(default_factory=default_phases)
    """The phases by name, in their order; `name: null` leaves one of the base file out."""
    rate: RateConfig = RateConfig()
    seed: Seed = 0
    """Seed of weights, data order and selection noise."""
    global_batch_size: PositiveInt = 2048
    """Images per step over all ranks (2,048 in the paper)."""
    micro_batch_size: PositiveInt | None = None
    """Images per rank and backward pass; gradients are accumulated up to the global batch. None takes each rank's share at once."""
    commitment_cost: NonNegativeFloat = 0.0
    """Weight of the term that draws vectors to their codes; 0 as in Eq. 4."""
    likeness_weight: NonNegativeFloat = 0.0
    """Weight of a term that keeps an image's tokens from being alike (see `likeness_loss`); 0 as in Eq. 4. It puts more codes to use."""
    kmeans_batches: PositiveInt = 8
    """Global batches whose vectors initialise the codebook, and over which a selector is calibrated."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the moving average of the weights, which is then the product; 0 publishes the weights themselves."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """`bf16` multiplies matrices in bf16; weights, optimizer, selector, codebook and losses stay in fp32."""
    zero_stage: Literal[0, 1, 2] = 1
    """DeepSpeed's ZeRO stage: 1 shares out the optimizer's state over the ranks, 2 also the gradients. Muon needs 0."""
    feature_cache_bytes: NonNegativeInt = 1 << 30
    """Memory per rank for the frozen features of images already seen, bytes."""
    feature_disk_bytes: NonNegativeInt = 0
    """Disk space for them besides, bytes: the budget of the folder, which all ranks of a machine share. 0 keeps none on disk."""
    feature_folder: str | None = None
    """Folder of the features on disk, which runs over the same tars and tower may share; None is RUN_DIR/features."""
    optimizer: OptimizerConfig = OptimizerConfig(betas=(0.9, 0.99), eps=1e-6, weight_decay=0.001, warmup_steps=500)
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    logging: LoggingConfig = LoggingConfig()
    health: TokenizerHealthConfig = TokenizerHealthConfig()
    """What is watched, how often, and what happens when the tokenizer collapses."""
    num_threads: PositiveInt | None = None
    """CPU threads per process; None leaves torch's choice."""

    @property
    def model(self) -> VisualTokenizerConfig:
        """The sizes of the tokenizer as its folder records them."""
        return VisualTokenizerConfig(encoder=self.encoder, merger=self.merger, codebook=self.codebook, decoder=self.decoder)

    @property
    def schedule(self) -> dict[str, PhaseConfig]:
        """The phases that take place, in their order."""
        return {name: phase for name, phase in self.phases.items() if phase is not None}

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all phases."""
        return sum(phase.steps for phase in self.schedule.values())

    def optimizer_of(self, phase: PhaseConfig) -> OptimizerConfig:
        """`optimizer` with what `phase` sets of its schedule."""
        return replace(
            self.optimizer,
            schedule=phase.schedule or self.optimizer.schedule,
            warmup_steps=self.optimizer.warmup_steps if phase.warmup_steps is None else phase.warmup_steps,
        )

    def initialises_codebook(self, name: str) -> bool:
        """Whether phase `name` starts by setting the codebook from k-means."""
        phase = self.schedule[name]
        if phase.initialise_codebook is not None:
            return phase.initialise_codebook
        names = list(self.schedule)
        first = names.index(name) == 0
        came_on = phase.quantize and (not self.initial if first else not self.schedule[names[names.index(name) - 1]].quantize)
        return came_on and self.codebook.initialisation == "kmeans"

    def validate(self) -> None:
        self.model.validate()
        phases = self.schedule
        check(bool(phases), "phases holds no phase; give at least one, such as those of configs/lavit-7b/tokenizer.yaml.")
        for name, phase in phases.items():
            _check_phase(name, phase)
            check(
                set(phase.train) != {"codebook"} or self.codebook.learning == "gradient",
                f"phases.{name}.train names the codebook alone, which no gradient moves; name another part too, such as the decoder.",
            )
            warmup = self.optimizer_of(phase).warmup_steps
            check(
                warmup < phase.steps,
                f"phases.{name} has {phase.steps} steps, all of them in its warm-up of {warmup}; set phases.{name}.warmup_steps or"
                " optimizer.warmup_steps below that.",
            )
        check_schedules({f"phases.{name}.steps": (self.optimizer_of(phase), phase.steps) for name, phase in phases.items()})
        check(
            self.feature_folder is None or self.feature_disk_bytes > 0,
            "feature_folder is set, but feature_disk_bytes is 0, so nothing is kept there; give it bytes, or leave feature_folder out.",
        )
        for (before, first), (after, second) in pairwise(phases.items()):
            check(
                second.quantize or not first.quantize,
                f"phases.{after}.quantize is false after phases.{before}, where it is true; a quantizer stays on once it is on.",
            )
        check(
            self.optimizer.name != "muon" or self.zero_stage == 0,
            f"zero_stage {self.zero_stage} keeps flat pieces of the weights, of which Muon can't see that they were matrices;"
            " set zero_stage=0, or optimizer.name=adamw.",
        )
        check(
            self.codebook.learning == "ema" or self.zero_stage == 0,
            f"zero_stage {self.zero_stage} keeps its own copy of codes that learn by gradient, and would undo their coming back to unit"
            " length; set zero_stage=0, or codebook.learning=ema.",
        )


def _check_phase(name: str, phase: PhaseConfig) -> None:
    label = f"phases.{name}"
    check(bool(phase.train), f"{label}.train is empty; name at least one of {', '.join(PARTS)}.")
    check(len(set(phase.train)) == len(phase.train), f"{label}.train names a part twice; name each once.")
    check(
        "codebook" not in phase.train or phase.quantize,
        f"{label}.train names the codebook, but {label}.quantize is false; switch the quantizer on, or leave the codebook out.",
    )
    check(
        not phase.straight_through or phase.selection == "gumbel",
        f"{label}.selection {phase.selection} lets no gradient reach the selector; choose selection: gumbel, or"
        " selector_signal: reconstruction_error, or take the selector out of train.",
    )
    check(
        set(phase.part_learning_rate_scales) <= set(phase.train),
        f"{label}.part_learning_rate_scales names a part that {label}.train doesn't; name parts that learn.",
    )
