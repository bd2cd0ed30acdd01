"""The token selector: which patches are worth a token (section 3.2 of the paper, `token_predictor.*`)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-5
KEEP = 0
"""Channel of the selector's output that means keep."""


class TokenSelector(nn.Module):
    """An MLP over each patch and the mean of all, after DynamicViT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(width, eps=LAYER_NORM_EPS), nn.Linear(width, width), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
            nn.LogSoftmax(dim=-1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Patch features [batch, patch, width] to log-probabilities [batch, patch, 2], channel 0 = keep.

        In fp32 whatever the precision around it: a choice between two near scores must not turn on rounding.
        """
        with torch.autocast(features.device.type, enabled=False):
            local, pooled = self.in_conv(features.float()).chunk(2, dim=-1)
            pooled = pooled.mean(dim=1, keepdim=True).expand_as(local)
            return self.out_conv(torch.cat([local, pooled], dim=-1))

    @torch.no_grad()
    def calibrate(self, log_probs: Tensor, keep_ratio: float, *, sampled: bool = True) -> None:
        """Shifts the bias of "keep" so that a share `keep_ratio` would be kept of the patches that `log_probs` [..., 2] belong to.

        That is their mean keep probability where the selection is `sampled`, and the share of those that win where it is the arg-max.
        """
        margin = (log_probs[..., KEEP] - log_probs[..., 1 - KEEP]).double()
        low, high = -50.0, 50.0
        for _ in range(60):
            middle = (low + high) / 2
            kept = torch.sigmoid(margin + middle) if sampled else (margin + middle >= 0).double()
            low, high = (low, middle) if kept.mean() > keep_ratio else (middle, high)
        last = self.out_conv[4]
        assert isinstance(last, nn.Linear)
        last.bias[KEEP] += low


def select(log_probs: Tensor, gumbel_noise: Tensor | None) -> Tensor:
    """The keep mask [batch, patch] of bools: arg-max of log-probabilities [batch, patch, 2] plus noise, or of them alone."""
    scores = log_probs if gumbel_noise is None else log_probs + gumbel_noise
    return scores[..., KEEP] >= scores[..., 1 - KEEP]


def select_some(log_probs: Tensor, gumbel_noise: Tensor | None) -> Tensor:
    """`select`, but that an image always keeps at least one patch."""
    return keep_at_least_one(select(log_probs, gumbel_noise), log_probs if gumbel_noise is None else log_probs + gumbel_noise)


def keep_at_least_one(keep_mask: Tensor, scores: Tensor) -> Tensor:
    """The mask [batch, patch] of bools, but that an image of which nothing would be kept keeps its patch of the highest score.

    `scores` [batch, patch, 2] are what the mask was decided by.
    """
    margin = scores[..., KEEP] - scores[..., 1 - KEEP]
    best = F.one_hot(margin.argmax(-1), margin.shape[1]).bool()
    return torch.where(keep_mask.any(-1, keepdim=True), keep_mask, best)


def select_straight_through(log_probs: Tensor, gumbel_noise: Tensor, temperature: float) -> Tensor:
    """The mask [batch, patch] of zeros and ones that `select_some` gives, with the gradient of Eq. 1's softmax at `temperature`."""
    soft = F.softmax((log_probs + gumbel_noise) / temperature, dim=-1)[..., KEEP]
    hard = select_some(log_probs, gumbel_noise).to(soft.dtype)
    return hard + soft - soft.detach()


def gumbel_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise, fp32, on the generator's device."""
    uniform = torch.rand(shape, generator=generator, device=generator.device)
    tiny = torch.finfo(uniform.dtype).tiny
    return -(-(uniform.clamp_min(tiny)).log()).clamp_min(tiny).log()


def keyed_gumbel_noise(keys: Sequence[str], num_patches: int, seed: int) -> Tensor:
    """Noise [sample, patch, 2] that depends on `seed` and each sample's key alone: an image gets the same ids in any batch."""
    generator = torch.Generator()
    noise = []
    for key in keys:
        digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        noise.append(gumbel_noise((num_patches, 2), generator))
    return torch.stack(noise)
