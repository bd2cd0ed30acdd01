"""The token merger: kept patches absorb what the dropped ones knew (section 3.2, Eq. 2, `causal_encoder.*`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lavit_dist.config.model import MergerConfig
from lavit_dist.models.attention import CrossAttention, Mlp, SelfAttention


class MergerBlock(nn.Module):
    """Causal self-attention over kept patches, cross-attention to dropped ones, feed-forward; each after its norm."""

    def __init__(self, width: int, config: MergerConfig) -> None:
        super().__init__()
        self.norm0 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.token_causal_attn = SelfAttention(width, config.heads)
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.token_cross_attn = CrossAttention(width, config.heads)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = Mlp(width, config.mlp_hidden)

    def forward(self, x: Tensor, memory: Tensor, kept: Tensor, dropped: Tensor) -> Tensor:
        x = x + self.token_causal_attn(self.norm0(x), kept)
        x = x + self.token_cross_attn(self.norm1(x), memory, dropped)
        return x + self.mlp(self.norm2(x))


class TokenMerger(nn.Module):
    """Runs on every position; only the kept positions of its output are used."""

    def __init__(self, width: int, config: MergerConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MergerBlock(width, config) for _ in range(config.layers))
        self.ln_vision = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, features: Tensor, keep_mask: Tensor) -> Tensor:
        """`features` [batch, patch, width], `keep_mask` [batch, patch] of 0.0 and 1.0 (gradients reach it), to [batch, patch, width].

        A kept patch attends to the kept ones before it in raster order and to itself. Cross-attention reads the encoder's
        features, the same in every block.
        """
        keep = keep_mask[:, None, None, :]
        num_patches = features.shape[1]
        ones = torch.ones(num_patches, num_patches, dtype=features.dtype, device=features.device)
        kept = (keep + (1 - keep) * ones.triu().tril()) * ones.tril()
        memory = self.ln_vision(features)
        x = features
        for block in self.blocks:
            x = block(x, memory, kept, 1 - keep)
        return self.norm(x)
