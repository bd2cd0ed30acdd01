"""Frozen features of images already seen, so that later epochs over a small set cost no tower."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class FeatureCache:
    """`encode`, from sample keys and pixels [batch, 3, H, W] to [batch, patch, width], remembered up to `budget` bytes.

    Images are remembered by their index in the data set: keys may come again in another tar.
    """

    def __init__(self, encode: Callable[[Sequence[str], Tensor], Tensor], budget: int) -> None:
        self.encode = encode
        self.budget = budget
        self._features: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, indices: Sequence[int], keys: Sequence[str], pixel_values: Tensor) -> Tensor:
        """Features [batch, patch, width] of the images `indices`, whose keys and pixels are at hand for those not remembered."""
        unknown = [place for place, index in enumerate(indices) if index not in self._features]
        fresh = (
            dict(zip(unknown, self.encode([keys[place] for place in unknown], pixel_values[unknown]), strict=True))
            if unknown
            else {}
        )
        for place, features in fresh.items():
            size = features.numel() * features.element_size()
            if size <= self.budget:
                self.budget -= size
                self._features[indices[place]] = features.clone()
        return torch.stack([fresh[place] if place in fresh else self._features[index] for place, index in enumerate(indices)])
