"""How many tokens the images of a stretch of training were given."""

from __future__ import annotations

import torch
from torch import Tensor


class TokenCounts:
    """A histogram of tokens per image that a trainer fills and whoever draws it empties."""

    def __init__(self, num_patches: int) -> None:
        self._counts = torch.zeros(num_patches + 1, dtype=torch.long)

    def add(self, tokens: Tensor) -> None:
        """Counts images with `tokens` [image] tokens each, whole numbers of any type."""
        self._counts += torch.bincount(tokens.detach().long().cpu(), minlength=len(self._counts))

    def take(self) -> list[int]:
        """How many images had 0, 1, … `num_patches` tokens since the last `take`."""
        counts = self._counts.tolist()
        self._counts.zero_()
        return counts
