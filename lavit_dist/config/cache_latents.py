"""Settings of `data_prep/cache_latents.py`."""

from __future__ import annotations

from pydantic import PositiveInt

from lavit_dist.config.base import config
from lavit_dist.config.image_job import ImageJobConfig


@config
class CacheLatentsConfig(ImageJobConfig):
    """Of which images latents are kept, by which autoencoder."""

    vae: str
    """Folder of a diffusers AutoencoderKL, such as stable-diffusion-v1-5/vae."""
    image_size: PositiveInt = 512
    """Height and width of the painted image, pixels: what `train_decoder` has as `image_size`."""
    inputs_per_shard: int = 1
    """Tars that make one shard: of 512-pixel images 10,000 pairs give 330 MB, of which an actor holds two, and its writer for a moment six."""
