"""What a step of decoder training learns from: latents of images, and the features that the frozen tokenizer makes of their codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lavit_dist.config.decoder import TrainDecoderConfig
from lavit_dist.data.image import resized
from lavit_dist.data.latent_encoder import for_latents
from lavit_dist.data.latent_set import LatentBatches
from lavit_dist.data.pair_batches import PairBatches
from lavit_dist.engine.feature_cache import FeatureCache
from lavit_dist.errors import check
from lavit_dist.models.pixel_decoder import Latents
from lavit_dist.models.selector import keyed_gumbel_noise
from lavit_dist.models.visual_tokenizer import VisualTokenizer
from lavit_dist.parallel.distributed import device


class Example(NamedTuple):
    """One rank's share of a step, on its device."""

    clean: Tensor
    """Latents [batch, channel, height, width], fp32."""
    features: Tensor
    """[batch, patch, width]."""


class Examples(Protocol):
    """Where examples come from."""

    def batch(self, step: int) -> Example:
        """This rank's share of batch `step`."""

    def state(self) -> dict[str, Any]:
        """What tells the data apart from others, plain values."""

    def check_state(self, state: dict[str, Any]) -> None:
        """Raises `UserError` when a run that was trained on data of this `state` can't go on with these."""


class ExamplesFromPairs:
    """Latents and codes made of pixels in each step; features are remembered within `feature_cache_bytes`."""

    def __init__(self, config: TrainDecoderConfig, batches: PairBatches, latents: Latents, tokenizer: VisualTokenizer) -> None:
        self.config, self.batches, self.latents = config, batches, latents
        self.tokenizer = tokenizer.to(device())
        self.features = FeatureCache(self._reconstruct, memory_bytes=config.feature_cache_bytes)

    def batch(self, step: int) -> Example:
        """This rank's share of batch `step`."""
        batch = self.batches.batch(step)
        pixel_values = batch.pixel_values.to(device())
        features = self.features([str(index) for index in batch.indices], pixel_values)
        return Example(self.latents.encode(for_latents(pixel_values, self.config.image_size)), features)

    def state(self) -> dict[str, Any]:
        """Nothing: the settings name the pairs."""
        return {}

    def check_state(self, state: dict[str, Any]) -> None:
        """Nothing to compare."""

    def _reconstruct(self, indices: Sequence[str], pixel_values: Tensor) -> Tensor:
        """Features [batch, patch, width] that the tokenizer makes of its own codes; each image's selection noise follows its key.

        The cache knows images by their index in the data set: keys may come again in another tar.
        """
        encoder = self.tokenizer.config.encoder
        seen = resized(pixel_values, encoder.image_size)
        noise = None
        if self.config.selection == "gumbel":
            keys = [self.batches.dataset.samples[int(index)].key for index in indices]
            noise = keyed_gumbel_noise(keys, encoder.num_patches, self.config.seed).to(seen.device)
        return self.tokenizer.reconstruct(self.tokenizer.tokenize(seen, noise).codes)


class ExamplesFromLatents:
    """Latents and codes read from a set of `data_prep/cache_latents.py`: neither tower nor autoencoder computes."""

    def __init__(self, batches: LatentBatches, tokenizer: VisualTokenizer) -> None:
        self.batches, self.tokenizer = batches, tokenizer
        tokenizer.decoder.to(device())
        tokenizer.quantizer.to(device())

    @torch.no_grad()
    def batch(self, step: int) -> Example:
        """This rank's share of batch `step`."""
        batch = self.batches.batch(step)
        codes = [torch.from_numpy(ids).to(device()) for ids in batch.codes]
        return Example(torch.from_numpy(batch.latents).to(device(), torch.float32), self.tokenizer.reconstruct(codes))

    def state(self) -> dict[str, Any]:
        """The set's fingerprint."""
        return {"latents": self.batches.shards.manifest.fingerprint}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raises `UserError` for another set."""
        now, then = self.state()["latents"], state.get("latents")
        check(
            now == then,
            f"The run was trained on the latents {str(then)[:16]}, but {self.batches.shards.manifest.folder} now holds {now[:16]}; put back"
            " the set it was trained on, or start a new run.",
        )
