"""Frozen features of images already seen, so that later epochs over a small set cost no tower."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class FeatureCache:
    """`encode`, from sample keys and pixels [batch, 3, H, W] to [batch, patch, width], remembered by key up to `budget` bytes."""

    def __init__(self, encode: Callable[[Sequence[str], Tensor], Tensor], budget: int) -> None:
        self.encode = encode
        self.budget = budget
        self._features: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, keys: Sequence[str], pixel_values: Tensor) -> Tensor:
        """Features [batch, patch, width] of the images `keys`, whose pixels are at hand for those not remembered."""
        unknown = [index for index, key in enumerate(keys) if key not in self._features]
        fresh = (
            dict(zip(unknown, self.encode([keys[index] for index in unknown], pixel_values[unknown]), strict=True))
            if unknown
            else {}
        )
        for index, features in fresh.items():
            size = features.numel() * features.element_size()
            if size <= self.budget:
                self.budget -= size
                self._features[keys[index]] = features.clone()
        return torch.stack([fresh[index] if index in fresh else self._features[key] for index, key in enumerate(keys)])
