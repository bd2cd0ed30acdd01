"""From codes to pixels: reconstructed features, then DDIM steps with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lavit_dist.checkpoint.pixel_decoding import LoadedDecoder, load_pixel_decoder
from lavit_dist.config.generate import SamplingConfig
from lavit_dist.data.image import normalise, resized
from lavit_dist.models.pixel_decoder import VaeLatents
from lavit_dist.parallel.distributed import matmul_precision


class Painter:
    """Paints the images that sequences of visual codes stand for."""

    def __init__(self, loaded: LoadedDecoder, sampling: SamplingConfig) -> None:
        self.loaded = loaded
        self.tokenizer, self.decoder, self.latents, self.scheduler = loaded
        self.num_inference_steps = sampling.num_inference_steps
        self.guidance_scale = sampling.decoder_guidance_scale
        self.num_paintings = sampling.num_paintings
        self.batch_size = sampling.batch_size
        self.precision = sampling.precision

    @classmethod
    def load(cls, folder: str | Path, sampling: SamplingConfig, device: torch.device) -> Painter:
        """Reads the product of train_decoder, the tokenizer included. Raises `UserError` for what is missing."""
        loaded = load_pixel_decoder(folder)
        loaded.tokenizer.to(device)
        loaded.decoder.to(device)
        if isinstance(loaded.latents, VaeLatents):
            loaded.latents.vae.to(device)
        return cls(loaded, sampling)

    @torch.inference_mode()
    def paint(self, codes: Sequence[Tensor], seed: int) -> list[Image.Image]:
        """One picture per sequence of codes [token] (0 .. K - 1, at least one).

        The n-th painting of the i-th sequence starts from the i-th noise of seed + n; the painting that is most like what the codes
        stand for is kept.
        """
        generators = [torch.Generator().manual_seed(seed + number) for number in range(self.num_paintings)]
        pictures: list[Image.Image] = []
        for start in range(0, len(codes), self.batch_size):
            features = self.tokenizer.reconstruct(codes[start : start + self.batch_size])
            paintings = torch.stack([self._paint_once(features, generator) for generator in generators])
            best = torch.zeros(len(features), dtype=torch.long)
            if len(paintings) > 1:
                best = torch.stack([self.likeness(painting, features) for painting in paintings]).argmax(0)
            pictures += [to_picture(paintings[choice, index]) for index, choice in enumerate(best.tolist())]
        return pictures

    def _paint_once(self, features: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.stack([torch.randn(self.decoder.latent_shape, generator=generator) for _ in features])
        with matmul_precision(self.precision):
            return self.latents.decode(self.denoise(noise.to(features.device), features))

    def likeness(self, pixels: Tensor, features: Tensor) -> Tensor:
        """Cosine [batch] of the tower's contrastive embeddings of pixels [batch, 3, height, width] in [-1, 1] and of features."""
        encoder = self.tokenizer.encoder
        seen = resized((pixels + 1) * 127.5, encoder.config.image_size).clamp(0, 255)
        return F.cosine_similarity(encoder.embed(normalise(seen)), encoder.embed_features(features), dim=-1)

    def denoise(self, noise: Tensor, features: Tensor) -> Tensor:
        """Latents [batch, channel, height, width] that the U-Net makes of `noise`, given features [batch, patch, width]."""
        condition = self.decoder.condition(features)
        latents = noise * self.scheduler.init_noise_sigma
        self.scheduler.set_timesteps(self.num_inference_steps, device=noise.device)
        for timestep in self.scheduler.timesteps:
            predicted = self.guided(latents, timestep.expand(len(latents)), condition)
            latents = self.scheduler.step(predicted, timestep, latents).prev_sample
        return latents

    def guided(self, latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """eps(0) + guidance_scale x (eps(condition) - eps(0)); a scale of 1 is the conditional prediction alone."""
        if self.guidance_scale == 1:
            return self.decoder(latents, timesteps, condition)
        both = torch.cat([torch.zeros_like(condition), condition])
        without, given = self.decoder(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), both).chunk(2)
        return without + self.guidance_scale * (given - without)


def to_picture(pixels: Tensor) -> Image.Image:
    """Pixels [3, height, width] in [-1, 1] as an image."""
    values = ((pixels.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())
