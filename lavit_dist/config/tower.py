"""Settings of contrastive tower training."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from lavit_dist.config.base import Seed, config
from lavit_dist.config.images import MAX_PIXELS
from lavit_dist.config.model import VisionEncoderConfig
from lavit_dist.config.training import CheckpointConfig, FaultsConfig, LoggingConfig, OptimizerConfig, check_schedules
from lavit_dist.errors import check


@config
class TextEncoderConfig:
    """The caption encoder that is thrown away after training."""

    width: int = 512
    """Channels."""
    layers: int = 4
    """Transformer blocks."""
    heads: int = 8
    """Attention heads."""
    max_tokens: int = 77
    """Longest caption, tokens; longer ones are cut (77 as in CLIP)."""

    def validate(self) -> None:
        check(
            self.width % self.heads == 0,
            f"text.width {self.width} is not a multiple of text.heads {self.heads}; choose a multiple.",
        )


@config
class TrainTowerConfig:
    """Trains a vision tower and a caption encoder with CLIP's loss; the tower is the product."""

    run_dir: str
    """Folder of the run."""
    pairs: str
    """Folder of tars of image-text pairs (a split that data_prep/ingest.py or make_shapes.py wrote)."""
    text_tokenizer: str
    """Folder of the text tokenizer."""
    encoder: VisionEncoderConfig = VisionEncoderConfig()
    text: TextEncoderConfig = TextEncoderConfig()
    seed: Seed = 0
    """Seed of weights and data order."""
    total_steps: PositiveInt = 1000
    """Optimizer steps."""
    global_batch_size: PositiveInt = 256
    """Pairs per step over all ranks; every other pair of the batch is a negative."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """`bf16` multiplies matrices in bf16; weights, optimizer and losses stay in fp32."""
    max_pixels: PositiveInt = MAX_PIXELS
    """Largest picture that is decoded, pixels (Pillow's own limit); larger ones are passed over."""
    optimizer: OptimizerConfig = OptimizerConfig(betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    logging: LoggingConfig = LoggingConfig()
    num_threads: PositiveInt | None = None
    """CPU threads per process; None leaves torch's choice."""

    def validate(self) -> None:
        check_schedules({"total_steps": (self.optimizer, self.total_steps)})
