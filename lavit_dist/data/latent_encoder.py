"""From pixels to the latents that a pixel decoder learns to paint, beside the codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lavit_dist.data.image import denormalise, resized
from lavit_dist.data.pair_documents import EncodedImage
from lavit_dist.data.pair_encoder import ImageEncoder
from lavit_dist.models.pixel_decoder import Latents
from lavit_dist.models.visual_tokenizer import VisualTokenizer


class LatentEncoder(ImageEncoder):
    """Latents beside codes, of pictures of the size that is painted: the tower sees them shrunk, as decoder training has it."""

    def __init__(self, visual: VisualTokenizer, latents: Latents, image_size: int, *, seed: int | None) -> None:
        """`latents` must be on the tokenizer's device; they are of pictures of `image_size`, those given may be larger."""
        super().__init__(visual, seed=seed)
        self.latents, self.image_size = latents, image_size

    def encode_values(self, keys: Sequence[str], pixel_values: Tensor) -> list[EncodedImage]:
        images = super().encode_values(keys, resized(pixel_values, self.visual.config.encoder.image_size))
        latents = self.latents.encode(for_latents(pixel_values, self.image_size)).to(torch.float16).cpu().numpy()
        return [replace(image, latents=each.tobytes()) for image, each in zip(images, latents, strict=True)]


def for_latents(pixel_values: Tensor, image_size: int) -> Tensor:
    """What latents are made of, [batch, 3, image_size, image_size] in [-1, 1], of preprocessed pixels [batch, 3, H, W] of any size."""
    return (2 * denormalise(resized(pixel_values, image_size)) - 1).clamp(-1, 1)
