"""The text side of contrastive training, for a tower that has no pretrained weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lavit_dist.config.tower import TextEncoderConfig


class TextEncoder(nn.Module):
    """A bidirectional transformer over caption ids; its mean feature is projected into the shared space."""

    def __init__(self, config: TextEncoderConfig, vocab_size: int, head_out: int) -> None:
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(vocab_size, config.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.max_tokens, config.width))
        layer = nn.TransformerEncoderLayer(
            config.width, config.heads, 4 * config.width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, config.layers, norm=nn.LayerNorm(config.width), enable_nested_tensor=False)
        self.head = nn.Linear(config.width, head_out)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """`ids` [batch, token] int64, `mask` [batch, token] bools (True = a token), to embeddings [batch, head_out]."""
        x = self.token_embed(ids) + self.pos_embed[:, : ids.shape[1]]
        x = self.blocks(x, src_key_padding_mask=~mask) * mask[..., None]
        return self.head(x.sum(1) / mask.sum(1, keepdim=True))
