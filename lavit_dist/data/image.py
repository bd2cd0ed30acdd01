"""From a picture to the tower's input, and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image

from lavit_dist.data.picture import squash

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of each channel in CLIP's preprocessing, which the released LaVIT shares."""
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of each channel in CLIP's preprocessing."""


def resize(image: Image.Image, size: int) -> torch.Tensor:
    """`squash` as a tensor, uint8 [3, size, size]."""
    return torch.from_numpy(squash(image, size))


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 3, H, W] to float32 with CLIP's mean and deviation per channel."""
    mean, std = (_channels(values).to(pixels.device) for values in (IMAGE_MEAN, IMAGE_STD))
    return (pixels.to(torch.float32) / 255 - mean) / std


def denormalise(pixel_values: torch.Tensor) -> torch.Tensor:
    """Undoes `normalise`: [..., 3, H, W] to shares of full intensity, 0 to 1 for what was a picture."""
    return pixel_values * _channels(IMAGE_STD).to(pixel_values) + _channels(IMAGE_MEAN).to(pixel_values)


def resized(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Square pictures [batch, 3, H, H] at another size, by bicubic interpolation, which may overshoot their range."""
    if pixels.shape[-1] == size:
        return pixels
    return F.interpolate(pixels, size=size, mode="bicubic", antialias=True)


def preprocess(image: Image.Image, size: int) -> torch.Tensor:
    """The tower's input: bicubic squash to [3, size, size], then CLIP's mean and deviation, float32."""
    return normalise(resize(image, size))


def to_image(pixel_values: torch.Tensor) -> Image.Image:
    """One normalised picture [3, H, W] as an image; values out of range are clipped."""
    pixels = (denormalise(pixel_values.detach().float().cpu()) * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _channels(values: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor(values).view(3, 1, 1)
