"""Settings of visual tokenizer training."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from lavit_dist.config.base import Seed, config
from lavit_dist.config.model import CodebookConfig, MergerConfig, TokenizerDecoderConfig, VisionEncoderConfig, VisualTokenizerConfig
from lavit_dist.config.training import CheckpointConfig, LoggingConfig, OptimizerConfig
from lavit_dist.errors import check


@config
class TrainTokenizerConfig:
    """Trains selector, merger, quantizer and decoder on the features of a frozen tower (Eq. 4 of the paper)."""

    run_dir: str
    """Folder of the run."""
    pairs: str
    """Folder of tars of image-text pairs; only the images are used."""
    tower: str
    """Folder that holds visual_tokenizer/eva_vitg_psz14.bin, the frozen vision tower."""
    encoder: VisionEncoderConfig = VisionEncoderConfig()
    merger: MergerConfig = MergerConfig()
    codebook: CodebookConfig = CodebookConfig()
    decoder: TokenizerDecoderConfig = TokenizerDecoderConfig()
    seed: Seed = 0
    """Seed of weights, data order and selection noise."""
    total_steps: PositiveInt = 50_000
    """Optimizer steps (50,000 in the paper)."""
    quantize_from: PositiveInt = 20_000
    """Step at which the quantizer is switched on; before it, selector, merger and decoder learn on continuous vectors."""
    global_batch_size: PositiveInt = 2048
    """Images per step over all ranks (2,048 in the paper)."""
    keep_ratio: float = 1 / 3
    """Share of patches to keep on average, rho in Eq. 4."""
    rate_weight: NonNegativeFloat = 2.0
    """Weight of the keep-ratio term, lambda in Eq. 4."""
    commitment_cost: NonNegativeFloat = 0.0
    """Weight of the term that draws vectors to their codes; 0 as in Eq. 4."""
    selector_signal: Literal["straight_through", "reconstruction_error"] = "straight_through"
    """What the selector learns from while the quantizer is off. `straight_through` is Eq. 1's gradient, as in the paper; in a few hundred
    steps it is noise. With `reconstruction_error` patches are kept at random, at `keep_ratio`, and the selector learns which of the
    dropped ones come back worst (see `guidance_loss`)."""
    freeze_selector: bool = False
    """Stop the selector's learning when the quantizer is switched on, as the authors did by one of their accounts, with its bias set so
    that the keep ratio is met exactly; False goes on with every module, as by the other (official issues 10 and 29)."""
    gumbel_temperature: float = 1.0
    """Temperature of the straight-through gradient of Eq. 1 (1 as in the released code)."""
    kmeans_batches: PositiveInt = 8
    """Batches whose vectors initialise the codebook by k-means, and over which a frozen selector's bias is set."""
    feature_cache_bytes: NonNegativeInt = 1 << 30
    """Memory per rank for the frozen features of images already seen, bytes."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """`bf16` multiplies matrices in bf16; weights, optimizer and losses stay in fp32."""
    max_pixels: PositiveInt = 89_478_485
    """Largest picture that is decoded, pixels (Pillow's own limit); larger ones are passed over."""
    optimizer: OptimizerConfig = OptimizerConfig(betas=(0.9, 0.99), eps=1e-6, weight_decay=0.001, warmup_steps=500)
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    num_threads: PositiveInt | None = None
    """CPU threads per process; None leaves torch's choice."""

    @property
    def model(self) -> VisualTokenizerConfig:
        """The sizes of the tokenizer as its folder records them."""
        return VisualTokenizerConfig(encoder=self.encoder, merger=self.merger, codebook=self.codebook, decoder=self.decoder)

    def validate(self) -> None:
        self.model.validate()
        check(0 < self.keep_ratio < 1, f"keep_ratio {self.keep_ratio} must lie between 0 and 1.")
        check(
            0 < self.quantize_from < self.total_steps,
            f"quantize_from {self.quantize_from} must lie between 1 and total_steps - 1 = {self.total_steps - 1}.",
        )
        check(self.gumbel_temperature > 0, f"gumbel_temperature {self.gumbel_temperature} must be above 0.")
