"""Settings of conversions between forms of the tokenizer's weights."""

from __future__ import annotations

from typing import Literal

from lavit_dist.config.base import config
from lavit_dist.config.model import VisionEncoderConfig


@config
class ConvertTokenizerConfig:
    """How a tokenizer's files are written."""

    form: Literal["official", "safetensors"] = "official"
    """The released `.bin` files, or `.safetensors` with the same keys."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Type of every tensor (bf16 in the release); None leaves each as it is."""


@config
class ConvertTowerConfig(ConvertTokenizerConfig):
    """How EVA-CLIP's vision tower becomes the released `eva_vitg_psz14.bin`."""

    encoder: VisionEncoderConfig = VisionEncoderConfig()
    """Sizes of the tower that is wanted; those of the release if nothing is set."""
    interpolate_positions: bool = False
    """Resamples the position table of another image size; off, another size is refused."""
    fill_missing_head: bool = False
    """Makes up for a missing `norm` and `head` by ones and zeros. The tokenizer doesn't use them; choosing among several paintings
    by their contrastive embeddings does."""
