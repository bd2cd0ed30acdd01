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
        """Patch features [batch, patch, width] to log-probabilities [batch, patch, 2], channel 0 = keep, in fp32."""
        local, pooled = self.in_conv(features.float()).chunk(2, dim=-1)
        pooled = pooled.mean(dim=1, keepdim=True).expand_as(local)
        return self.out_conv(torch.cat([local, pooled], dim=-1))

    @torch.no_grad()
    def calibrate(self, log_probs: Tensor, keep_ratio: float) -> None:
        """Shifts the bias of "keep" so that the mean keep probability over `log_probs` [..., 2], which it gave, is `keep_ratio`."""
        margin = (log_probs[..., KEEP] - log_probs[..., 1 - KEEP]).double()
        low, high = -50.0, 50.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if torch.sigmoid(margin + middle).mean() > keep_ratio else (middle, high)
        last = self.out_conv[4]
        assert isinstance(last, nn.Linear)
        last.bias[KEEP] += low


def select(log_probs: Tensor, gumbel_noise: Tensor | None) -> Tensor:
    """The keep mask [batch, patch] of bools: arg-max of log-probabilities [batch, patch, 2] plus noise, or of them alone."""
    scores = log_probs if gumbel_noise is None else log_probs + gumbel_noise
    return scores[..., KEEP] >= scores[..., 1 - KEEP]


def select_straight_through(log_probs: Tensor, gumbel_noise: Tensor, temperature: float) -> Tensor:
    """The mask [batch, patch] of zeros and ones that `select` gives, with the gradient of Eq. 1's softmax at `temperature`."""
    soft = F.softmax((log_probs + gumbel_noise) / temperature, dim=-1)[..., KEEP]
    hard = select(log_probs, gumbel_noise).to(soft.dtype)
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
