"""The tokenizer's decoder: from codes back to the encoder's patch features (`tokenizer_decoder.bin`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lavit_dist.config.model import VisualTokenizerConfig
from lavit_dist.models.attention import CrossAttention, Mlp, SelfAttention, attention, merge_heads, split_heads


class DecoderBlock(nn.Module):
    """Self-attention over the queries, cross-attention to the codes, feed-forward; each after its norm."""

    def __init__(self, config: VisualTokenizerConfig) -> None:
        super().__init__()
        width, decoder = config.encoder.width, config.decoder
        self.norm0 = nn.LayerNorm(width, eps=decoder.layer_norm_eps)
        self.self_attn = SelfAttention(width, decoder.heads)
        self.norm1 = nn.LayerNorm(width, eps=decoder.layer_norm_eps)
        self.cross_attn = CrossAttention(width, decoder.heads)
        self.norm2 = nn.LayerNorm(width, eps=decoder.layer_norm_eps)
        self.mlp = Mlp(width, decoder.mlp_hidden)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm0(x))
        x = x + self.cross_attn(self.norm1(x), memory, mask)
        return x + self.mlp(self.norm2(x))


class QueryDecoder(nn.Module):
    """A learned query per patch reads the codes, bidirectionally. Codes carry their rank in the sequence, not their place."""

    def __init__(self, config: VisualTokenizerConfig) -> None:
        super().__init__()
        width, num_patches = config.encoder.width, config.encoder.num_patches
        self.in_proj = nn.Linear(config.codebook.dim, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches, width))
        self.query_embed = nn.Parameter(torch.zeros(1, num_patches, width))
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.decoder.depth))
        self.norm = nn.LayerNorm(width, eps=config.decoder.layer_norm_eps)
        self.decode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """Reconstructed patch features [batch, patch, width].

        `vectors` [batch, token, dim] are code vectors. `mask` [batch, token] says which are there: bools for packed tokens
        (padding at the end), or floats of 0 and 1 over all patch positions, which gradients reach. Either way the t-th token
        that is there has position embedding t.
        """
        rank = (mask.detach() > 0).cumsum(-1).sub(1).clamp_min(0)
        memory = self.in_proj(vectors) + self.pos_embed[0, rank]
        x = self.query_embed.expand(len(vectors), -1, -1)
        for block in self.blocks:
            x = block(x, memory, mask[:, None, None, :])
        return self.decode_task_layer(self.norm(x))


class TokenizerDecoder(QueryDecoder):
    """The decoder for Stable Diffusion 1.5 shapes: `unet_proj` makes the U-Net's condition."""

    def __init__(self, config: VisualTokenizerConfig) -> None:
        super().__init__(config)
        self.unet_proj = nn.Linear(config.encoder.width, config.decoder.unet_dim)

    def condition(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """The U-Net's condition [batch, patch, unet_dim]."""
        return self.unet_proj(self(vectors, mask))


class HighResolutionTokenizerDecoder(QueryDecoder):
    """The decoder for SDXL shapes (`highres_tokenizer_decoder.bin`): two prompt projections and a pooled one."""

    def __init__(self, config: VisualTokenizerConfig) -> None:
        super().__init__(config)
        width, decoder = config.encoder.width, config.decoder
        self.unet_proj_1 = nn.Linear(width, decoder.highres_dims[0])
        self.unet_proj_2 = nn.Linear(width, decoder.highres_dims[1])
        self.unet_attnpool = AttentionPool(config.encoder.num_patches, width, decoder.heads, decoder.pooled_dim)

    def condition(self, vectors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """SDXL's prompt embeddings [batch, patch, sum of highres_dims] and pooled embedding [batch, pooled_dim]."""
        features = self(vectors, mask)
        prompt = torch.cat([self.unet_proj_1(features), self.unet_proj_2(features)], dim=-1)
        return prompt, self.unet_attnpool(features)


class AttentionPool(nn.Module):
    """CLIP's attention pooling: the mean token attends to all tokens (`unet_attnpool.*`)."""

    def __init__(self, num_patches: int, width: int, heads: int, out: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.zeros(num_patches + 1, width))
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, out)

    def forward(self, features: Tensor) -> Tensor:
        """[batch, patch, width] to [batch, out]."""
        x = torch.cat([features.mean(1, keepdim=True), features], dim=1) + self.positional_embedding
        projected = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)
        query, key, value = (split_heads(part, self.heads) for part in projected)
        return self.c_proj(merge_heads(attention(query, key, value)))[:, 0]
