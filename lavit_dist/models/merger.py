"""The token merger: kept patches absorb what the dropped ones knew (section 3.2, Eq. 2, `causal_encoder.*`)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from lavit_dist.config.model import MergerConfig
from lavit_dist.models.attention import CrossAttention, Mlp, SelfAttention
from lavit_dist.models.kept_attention import PackedMemory, attention_among_kept, attention_to_dropped


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
        # Attributes, so that compiling can leave them out.
        self.attend_among_kept = attention_among_kept
        self.attend_to_dropped = attention_to_dropped

    def forward(self, x: Tensor, memory: Tensor, kept: Tensor, dropped: Tensor) -> Tensor:
        x = x + self.token_causal_attn(self.norm0(x), kept)
        x = x + self.token_cross_attn(self.norm1(x), memory, dropped)
        return x + self.mlp(self.norm2(x))

    def merge_kept(self, x: Tensor, memory: PackedMemory) -> Tensor:
        """The same of the kept patches alone, `x` [token, width]."""
        x = x + self._attend_to_kept(self.norm0(x), memory.kept)
        x = x + self._attend_to_dropped(self.norm1(x), memory)
        return x + self.mlp(self.norm2(x))

    def compile_merge_kept(self) -> None:
        """Has torch compile `merge_kept`, for any number of tokens, apart from its attention, whose shapes are those of the images."""
        self.attend_among_kept = torch.compiler.disable(attention_among_kept)
        self.attend_to_dropped = torch.compiler.disable(attention_to_dropped)
        self.merge_kept = torch.compile(self.merge_kept, dynamic=True)  # type: ignore[method-assign]

    def _attend_to_kept(self, x: Tensor, kept: list[int]) -> Tensor:
        layer = self.token_causal_attn
        query, key, value = layer.qkv(x).unflatten(-1, (3, layer.heads, -1)).unbind(1)
        return layer.proj(self.attend_among_kept(query, key, value, kept).flatten(1))

    def _attend_to_dropped(self, x: Tensor, memory: PackedMemory) -> Tensor:
        layer = self.token_cross_attn
        query = layer.query(x).unflatten(-1, (layer.heads, -1))
        key = layer.key(memory.keys_of).unflatten(-1, (layer.heads, -1))
        value = layer.value(memory.values_of).unflatten(-1, (layer.heads, -1))
        return layer.proj(self.attend_to_dropped(query, key, value, memory).flatten(1))


class TokenMerger(nn.Module):
    """Makes tokens of the kept patches: from every position under masks, or from the kept ones alone, which is faster."""

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

    def tokens(self, features: Tensor, keep_mask: Tensor, *, masked: bool = False) -> Tensor:
        """What the kept patches become, [token, width], image after image in raster order.

        `features` [batch, patch, width], `keep_mask` [batch, patch] of bools. `masked` computes every patch under masks, as released,
        instead of the kept ones alone.
        """
        return self(features, keep_mask.to(features.dtype))[keep_mask] if masked else self.merge_kept(features, keep_mask)

    def merge_kept(self, features: Tensor, keep_mask: Tensor) -> Tensor:
        """The kept patches' rows of `forward`, computed on kept patches alone: [token, width], image after image in raster order.

        `features` [batch, patch, width], `keep_mask` [batch, patch] of bools. Gradients reach the features and every layer, but
        not the mask. An image of which nothing is kept has no tokens.

        Where nothing is dropped, and in cross-attention always, this is the released computation. In self-attention the maximum
        and the eps of the released softmax run over dropped patches too, whose streams don't exist here; kept ones stand in for
        them. That moves an attention output by at most w x the largest distance between two values, w = eps / (S + eps), S >=
        exp(-gap), where the gap is by how much the largest score among all patches exceeds the largest attended one: w is 1e-6
        without a gap, 2e-5 at a gap of 3, 2e-2 at 10, and largest for the first tokens, which attend to few. On a GPU in half
        precision both attentions leave eps out, within the same bound.
        """
        used = keep_mask.any(-1)
        features, keep_mask = features[used], keep_mask[used]
        x = features[keep_mask]
        if not len(x):
            return self.norm(x)
        blocks = cast("list[MergerBlock]", list(self.blocks))
        # Frozen layers of lower precision would convert it in every block.
        memory = PackedMemory.of(self.ln_vision(features).to(blocks[0].token_cross_attn.key.weight.dtype), keep_mask)
        for block in blocks:
            x = block.merge_kept(x, memory)
        return self.norm(x)
