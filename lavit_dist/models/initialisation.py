"""Initial weights of the tower and of the visual tokenizer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lavit_dist.models.vision_encoder import VisionEncoder

INIT_STD = 0.02
RELEASED_WIDTH = 1408
"""Standard deviation of the released modules' truncated-normal initial weights, and the width that it belongs to."""


def initialise(module: nn.Module) -> None:
    """Truncated-normal weights, zero biases and unit norms.

    The released code takes a deviation of 0.02 at 1,408 channels. Scaled with the fan-in it is the same there and lets a signal
    through narrow layers too, where 0.02 would all but stop it.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(part.weight, std=INIT_STD * (RELEASED_WIDTH / part.weight[0].numel()) ** 0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        for name, parameter in part.named_parameters(recurse=False):
            if name in ("pos_embed", "query_embed"):
                parameter.data.copy_(
                    _sines(parameter.shape[1], parameter.shape[2], isinstance(part, VisionEncoder) or name == "query_embed")
                )
            elif name.endswith(("_token", "positional_embedding")):
                nn.init.trunc_normal_(parameter, std=INIT_STD)


def _sines(count: int, width: int, planar: bool) -> Tensor:
    """Embeddings [count, width] of places: sines and cosines of the rank, or of row and column in a square grid (as MAE starts).

    Learned from there on. One place more than a square is the class token's, which gets none.
    """
    side = math.isqrt(count)
    ranks = torch.arange(count, dtype=torch.float32)
    if not planar:
        return _waves(ranks, width)
    grid = torch.arange(side * side)
    places = torch.cat([_waves((grid // side).float(), width // 2), _waves((grid % side).float(), width // 2)], dim=-1)
    return torch.cat([places.new_zeros(count - side * side, width), places])


def _waves(positions: Tensor, width: int) -> Tensor:
    frequencies = 10000.0 ** (-torch.arange(width // 2) / (width // 2))
    angles = positions[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
