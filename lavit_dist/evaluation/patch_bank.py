"""Pictures of features: each patch is replaced by the patch of another picture whose feature is nearest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PatchBank:
    """Patches of pictures, and the features that the tower gives them there."""

    pixels: Tensor
    """[entry, 3, size, size], normalised."""
    features: Tensor
    """[entry, width], of unit length."""
    images: Tensor
    """[entry], which picture each comes from."""

    @classmethod
    def draw(
        cls, pixel_values: Tensor, features: Tensor, images: Tensor, num_patches: int, generator: torch.Generator
    ) -> PatchBank:
        """At most `num_patches` patches, drawn at random, of pictures [image, 3, H, W] with features [image, patch, width].

        `images` [image] are the pictures' numbers.
        """
        patches = split_patches(pixel_values.cpu(), features.shape[1])
        chosen = torch.randperm(patches.shape[0] * patches.shape[1], generator=generator)[:num_patches]
        unit = F.normalize(features.flatten(0, 1)[chosen.to(features.device)].float(), dim=-1)
        return cls(patches.flatten(0, 1)[chosen], unit, images.repeat_interleave(patches.shape[1])[chosen])

    @classmethod
    def join(cls, banks: Sequence[PatchBank]) -> PatchBank:
        """The patches of all `banks`."""
        return cls(*(torch.cat([getattr(bank, name) for bank in banks]) for name in ("pixels", "features", "images")))

    def mosaic(self, features: Tensor, images: Tensor | None = None) -> Tensor:
        """Pictures [image, 3, H, W] in which every patch is the entry whose feature is nearest by cosine to `features`
        [image, patch, width]. An image with a number in `images` [image] is given no entry of that picture."""
        unit = F.normalize(features.to(self.features.device).float(), dim=-1)
        nearest = []
        for place, of_image in enumerate(unit):
            likeness = of_image @ self.features.T
            if images is not None:
                likeness = likeness.masked_fill((self.images == images[place]).to(likeness.device), -2.0)
            nearest.append(likeness.argmax(-1))
        return join_patches(self.pixels[torch.stack(nearest).cpu()])


def split_patches(pixel_values: Tensor, num_patches: int) -> Tensor:
    """Square pictures [image, 3, H, H] as their patches in raster order [image, patch, 3, size, size]."""
    grid = round(num_patches**0.5)
    size = pixel_values.shape[-1] // grid
    return pixel_values.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def join_patches(patches: Tensor) -> Tensor:
    """Undoes `split_patches`."""
    grid = round(patches.shape[1] ** 0.5)
    rows = patches.unflatten(1, (grid, grid)).permute(0, 3, 1, 4, 2, 5)
    return rows.flatten(4, 5).flatten(2, 3)
