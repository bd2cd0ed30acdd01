"""Latents for decoder training, made once: tars of pairs to shards that hold each image's codes and latents, and no text.

The folders are those of `pipelines.image_jobs`, and the shards are id shards of images alone with one column more, so that whatever
reads, verifies, reshards or merges id sets does the same with these.
"""

from __future__ import annotations

from lavit_dist.checkpoint.official import tokenizer_digest, visual_tokenizer_config
from lavit_dist.checkpoint.pixel_decoding import load_vae, vae_digest
from lavit_dist.config.cache_latents import CacheLatentsConfig
from lavit_dist.data.id_shard import Encoding, LatentEncoding
from lavit_dist.data.latent_encoder import LatentEncoder
from lavit_dist.data.pair_decoder import PairDecoder
from lavit_dist.errors import check
from lavit_dist.models.pixel_decoder import VaeLatents
from lavit_dist.observe.logs import setup_logging
from pipelines.image_jobs import preprocessing_digest, run_image_jobs, settings_digest
from pipelines.image_worker import ImageWorker


def run(config: CacheLatentsConfig) -> None:
    """Makes the shards that are missing or no longer match their inputs and models, then the manifests."""
    setup_logging()
    run_image_jobs(config, LatentWorker, lambda: describe_encoding(config), models=("tokenizer", "vae"))


def describe_encoding(config: CacheLatentsConfig) -> Encoding:
    """What turns images into codes and latents under `config`. Raises `UserError` for what is missing or doesn't fit."""
    visual = visual_tokenizer_config(config.tokenizer)
    vae = load_vae(config.vae)
    latents = VaeLatents(vae)
    check(
        config.image_size % latents.factor == 0,
        f"image_size {config.image_size} is not a multiple of {latents.factor}, by which the autoencoder in vae {config.vae} shrinks"
        " images; choose a multiple.",
    )
    side = config.image_size // latents.factor
    return Encoding(
        visual_tokenizer=tokenizer_digest(config.tokenizer),
        text_tokenizer=None,
        preprocessing=preprocessing_digest(decoded_size(config)),
        settings=settings_digest(config),
        text_vocab_size=0,
        codebook_size=visual.codebook.size,
        latents=LatentEncoding(vae_digest(vae), (latents.channels, side, side)),
    )


def decoded_size(config: CacheLatentsConfig) -> int:
    """The size that pictures are squashed to: what is painted, or what the tower sees if that is larger."""
    return max(config.image_size, visual_tokenizer_config(config.tokenizer).encoder.image_size)


class LatentWorker(ImageWorker):
    """Makes shards of images with latents."""

    config: CacheLatentsConfig

    def decoder(self) -> PairDecoder:
        return PairDecoder(None, decoded_size(self.config), self.config.max_pixels, self.config.filter)

    def models(self) -> LatentEncoder:
        latents = VaeLatents(load_vae(self.config.vae).to(self.device))
        return LatentEncoder(self.tokenizer(), latents, self.config.image_size, seed=self.selection_seed)
