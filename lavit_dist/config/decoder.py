"""Settings of pixel decoder training."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from lavit_dist.config.base import Seed, config
from lavit_dist.config.id_cache import IdCacheConfig
from lavit_dist.config.images import MAX_PIXELS
from lavit_dist.config.model import PixelDecoderConfig
from lavit_dist.config.training import CheckpointConfig, FaultsConfig, LoggingConfig, OptimizerConfig, check_schedules
from lavit_dist.errors import check


@config
class TrainDecoderConfig:
    """Trains the diffusion U-Net that paints an image from what the visual tokenizer reconstructs of it (Eq. 5 of the paper)."""

    run_dir: str
    """Folder of the run."""
    pairs: str | None = None
    """Folder of tars of image-text pairs, of which only the images are used; or `latents`."""
    latents: str | None = None
    """Folder or URL of one split of a set that data_prep/cache_latents.py made of images, in place of `pairs`."""
    id_cache: IdCacheConfig = IdCacheConfig()
    """How remote `latents` are read."""
    tokenizer: str
    """Folder that holds visual_tokenizer/, the frozen visual tokenizer; its `unet_proj` is trained here."""
    model: PixelDecoderConfig
    """Sizes of the U-Net and its noise schedule."""
    initial_unet: str | None = None
    """Folder of a diffusers U-Net to start from, such as stable-diffusion-v1-5/unet; None starts from random weights."""
    image_size: PositiveInt = 512
    """Height and width of the painted image, pixels (512 for Stable Diffusion 1.5); the tower sees its own size."""
    selection: Literal["gumbel", "argmax"] = "gumbel"
    """How patches are chosen, as in pretokenize: at random by the selector's probabilities, or the most probable."""
    seed: Seed = 0
    """Seed of weights, data order, patch selection and diffusion noise."""
    total_steps: PositiveInt = 20_000
    """Optimizer steps (20,000 in the paper)."""
    global_batch_size: PositiveInt = 128
    """Images per step over all ranks (128 in Video-LaVIT, table 8; LaVIT doesn't say)."""
    condition_dropout: float = 0.1
    """Share of images whose condition is zeros, for classifier-free guidance."""
    loss_weighting: Literal["epsilon", "min_snr"] = "epsilon"
    """Weight of a noise level in the squared error of the noise: 1 (Eq. 5), or min(SNR, snr_gamma) / SNR (arXiv 2303.09556)."""
    snr_gamma: float = 5.0
    """Largest weight in terms of the image's error, for `min_snr`."""
    snr_floor: float = 0.0
    """Least weight in terms of the image's error, for `min_snr`; 0 as in that paper. Above 0, the first and noisiest steps of painting
    are learned sooner."""
    ema_decay: float = 0.9999
    """Weight of the past in the moving average of the weights, which is the product; 0 publishes the last weights."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Type of the U-Net's matrix products (autocast); weights, optimizer and loss are fp32."""
    zero_stage: Literal[0, 1] = 0
    """DeepSpeed ZeRO: 1 spreads the optimizer's averages over the ranks."""
    feature_cache_bytes: NonNegativeInt = 1 << 30
    """Memory per rank for the frozen features of images already seen, bytes."""
    max_pixels: PositiveInt = MAX_PIXELS
    """Largest picture that is decoded, pixels (Pillow's own limit); larger ones are passed over."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-5, betas=(0.9, 0.99), weight_decay=0.001, warmup_steps=1000)
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    logging: LoggingConfig = LoggingConfig()
    num_threads: PositiveInt | None = None
    """CPU threads per process; None leaves torch's choice."""

    @property
    def latent_size(self) -> int:
        """Positions of the latent along one side."""
        return self.image_size // self.model.latent_factor

    def validate(self) -> None:
        check(
            (self.pairs is None) != (self.latents is None),
            "Give either pairs, a folder of tars, or latents, a set that data_prep/cache_latents.py made; not both.",
        )
        check(
            self.latents is None or self.model.latent == "vae",
            f"latents are those of an autoencoder, which model.latent {self.model.latent} does without; set it to vae, or give pairs.",
        )
        smallest = self.model.latent_factor * 2 ** (len(self.model.block_out_channels) - 1)
        check(
            self.image_size % smallest == 0,
            f"image_size {self.image_size} is not a multiple of {smallest}, which model.latent_factor and the number of"
            " model.block_out_channels ask for; choose a multiple.",
        )
        check_schedules({"total_steps": (self.optimizer, self.total_steps)})
        check(0 <= self.condition_dropout < 1, f"condition_dropout {self.condition_dropout} must be at least 0 and below 1.")
        check(
            self.optimizer.name == "adamw" or self.zero_stage == 0,
            f"optimizer.name {self.optimizer.name} needs every matrix whole on its rank, which zero_stage {self.zero_stage} does not"
            " leave; set zero_stage to 0, or optimizer.name to adamw.",
        )
        check(
            self.loss_weighting == "min_snr" or self.snr_floor == 0,
            f"snr_floor {self.snr_floor} has no meaning with loss_weighting {self.loss_weighting}; set loss_weighting to min_snr.",
        )
        check(0 <= self.ema_decay < 1, f"ema_decay {self.ema_decay} must be at least 0 and below 1.")
        check(
            0 <= self.snr_floor <= self.snr_gamma > 0,
            f"snr_floor {self.snr_floor} and snr_gamma {self.snr_gamma} must not be negative, and the floor not above the other.",
        )
