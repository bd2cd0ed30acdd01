"""CLIP's contrastive objective, which makes a small vision tower where no pretrained one can be had."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavit_dist.models.text_encoder import TextEncoder
from lavit_dist.models.vision_encoder import VisionEncoder

INITIAL_TEMPERATURE = 0.07
LARGEST_SCALE = 100.0
"""Both from the CLIP paper (arXiv 2103.00020, section 2.5)."""


class ContrastiveModel(nn.Module):
    """A vision tower and a text encoder that meet in one space."""

    def __init__(self, vision: VisionEncoder, text: TextEncoder) -> None:
        super().__init__()
        self.vision = vision
        self.text = text
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / INITIAL_TEMPERATURE)))

    def forward(self, pixel_values: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit embeddings of pictures and of captions [batch, head_out], and the scale [1] of their products."""
        scale = self.logit_scale.clamp(max=math.log(LARGEST_SCALE)).exp()
        pictures = F.normalize(self.vision.embed(pixel_values), dim=-1)
        return pictures, F.normalize(self.text(ids, mask), dim=-1), scale


def contrastive_loss(pictures: Tensor, captions: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """Symmetric cross-entropy over all pairs of unit embeddings [pair, head_out].

    `same` [pair, pair] bools marks captions that are as right for a picture as its own, equal ones and others of the same picture: the
    target is spread over them.
    """
    logits = scale * pictures @ captions.t()
    target = same.to(logits.dtype)
    target = target / target.sum(-1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2
