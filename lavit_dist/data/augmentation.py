"""The views of a picture: the squashed whole, or seeded random crops and mirror images of it."""

from __future__ import annotations

import math

import torch
from PIL import Image

from lavit_dist.config.images import AugmentationConfig, RandomCropConfig
from lavit_dist.data.hashing import stable_fraction, stable_hash
from lavit_dist.data.image import resize

Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a part of a picture, pixels."""


class Views:
    """Makes views of `size` x `size` pixels. A view depends on the seed, the picture's key and the view's number alone."""

    def __init__(self, config: AugmentationConfig, size: int, seed: int) -> None:
        self.config = config
        self.size = size
        self.seed = seed
        self._kind = f"{stable_hash('views', repr(config), seed) >> 32:08x}"

    def name(self, key: str, epoch: int) -> str:
        """What the picture `key` is called in `epoch`, by settings, seed and number of the view; features can be cached by it."""
        return f"{key}#{self._kind}.{self._number(epoch)}" if self.config.on else key

    def kept(self, image: Image.Image) -> Image.Image:
        """As much of a decoded picture as its views are made of."""
        return image if self.config.on else image.resize((self.size, self.size), Image.Resampling.BICUBIC)

    def make(self, image: Image.Image, key: str, epoch: int) -> torch.Tensor:
        """The view of a `kept` picture in `epoch`, uint8 [3, size, size]."""
        if not self.config.on:
            return resize(image, self.size)
        draws = [stable_fraction("view", self.seed, self._number(epoch), key, purpose) for purpose in range(5)]
        if self.config.random_crop is not None:
            box = crop_box(image.size, self.config.random_crop, draws[:4])
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        if self.config.horizontal_flip and draws[4] < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return resize(image, self.size)

    def _number(self, epoch: int) -> int:
        return epoch if self.config.views is None else epoch % self.config.views


def crop_box(size: tuple[int, int], config: RandomCropConfig, draws: list[float]) -> Box:
    """A rectangle within a picture of `size` (width, height), from four numbers in [0, 1): area, aspect ratio, place.

    A rectangle that would stick out is cut to the picture's side.
    """
    width, height = size
    area = width * height * (config.min_scale + draws[0] * (config.max_scale - config.min_scale))
    ratio = math.exp((2 * draws[1] - 1) * math.log(config.max_aspect_ratio))
    crop_width = min(max(math.sqrt(area * ratio), 1), width)
    crop_height = min(max(math.sqrt(area / ratio), 1), height)
    left, top = draws[2] * (width - crop_width), draws[3] * (height - crop_height)
    return left, top, left + crop_width, top + crop_height
