"""The EVA-CLIP vision transformer whose patch features LaVIT discretises (`eva_vitg_psz14.bin`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavit_dist.config.model import VisionEncoderConfig
from lavit_dist.models.attention import Mlp, attention, merge_heads, split_heads
from lavit_dist.models.frozen_linear import FrozenLinear


class EvaAttention(nn.Module):
    """Self-attention with biases on queries and values only (`q_bias`, `v_bias`, `qkv.weight`, `proj`)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv: nn.Linear | FrozenLinear = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = attention  # an attribute, so that compiling can leave it out

    def forward(self, x: Tensor) -> Tensor:
        # A frozen layer holds the biases itself.
        projected = F.linear(x, self.qkv.weight, self.qkv_bias) if self.qkv.bias is None else self.qkv(x)
        query, key, value = (split_heads(part, self.heads) for part in projected.chunk(3, dim=-1))
        return self.proj(merge_heads(self.attend(query, key, value)))

    @property
    def qkv_bias(self) -> Tensor:
        """The biases of queries, keys (none) and values in one, [3 x width]."""
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])


class EvaBlock(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: VisionEncoderConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.attn = EvaAttention(config.width, config.width // config.head_width)
        self.norm2 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = Mlp(config.width, config.mlp_hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Cuts an image into patches and projects each (`patch_embed.proj`)."""

    def __init__(self, config: VisionEncoderConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, kernel_size=config.patch_size, stride=config.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.proj(pixel_values.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class VisionEncoder(nn.Module):
    """EVA-CLIP ViT. The tokenizer reads its patch features; contrastive training reads its pooled embedding."""

    def __init__(self, config: VisionEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_patches + 1, config.width))
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(EvaBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.width, config.head_out)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features before the final norm.

        `pixel_values` [batch, 3, height, width], normalised with CLIP's mean and deviation, to [batch, 1 + patch, width], the
        class token first. These un-normalised features are what LaVIT selects, merges and reconstructs.
        """
        x = self.patch_embed(pixel_values)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x

    def patch_features(self, pixel_values: Tensor) -> Tensor:
        """[batch, patch, width]: `forward` without the class token."""
        return self(pixel_values)[:, 1:]

    def embed(self, pixel_values: Tensor) -> Tensor:
        """The contrastive embedding [batch, head_out] of images, not normalised."""
        return self.embed_features(self.patch_features(pixel_values))

    def embed_features(self, features: Tensor) -> Tensor:
        """The same of patch features [batch, patch, width]: `head` of the mean normalised one.

        The mean, not the class token, so that contrastive training shapes the very features that the tokenizer reads.
        """
        return self.head(self.norm(features).mean(1))
