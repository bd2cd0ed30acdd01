"""Attention and feed-forward layers that the tokenizer's parts share, with the released parameter names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavit_dist.models.frozen_linear import FrozenLinear

MANY_POSITIONS = 128
"""Positions from which attention in bf16 on a CPU is faster image by image."""
POLICY_EPS = 1e-6
"""Epsilon of the masked softmax in the released merger."""


def masked_softmax(scores: Tensor, mask: Tensor, eps: float = POLICY_EPS) -> Tensor:
    """Softmax over the last axis of `scores` [..., key] with a multiplicative `mask` in [0, 1] that gradients reach.

    The released form, (exp(s - max s) * mask + eps / key) / (sum + eps), in fp32; a key that is masked out still receives a
    gradient through its mask, which is how the selector learns what keeping a patch would have been worth.
    """
    scores = scores.float()
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * mask
    return (weights + eps / scores.shape[-1]) / (weights.sum(-1, keepdim=True) + eps)


class Mlp(nn.Module):
    """Linear, exact GELU, linear (`mlp.fc1`, `mlp.fc2`)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1: nn.Linear | FrozenLinear = nn.Linear(width, hidden)
        self.act: nn.Module = nn.GELU()
        self.fc2: nn.Linear | FrozenLinear = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection (`qkv`, `proj`)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`x` [batch, position, width]; `mask` None (attend to all), or multiplicative [batch, 1, query, key]."""
        query, key, value = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(merge_heads(_attend(query, key, value, mask)))


class CrossAttention(nn.Module):
    """Multi-head attention from `x` to a memory (`query`, `key`, `value`, `proj`)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """`x` [batch, query, width], `memory` [batch, key, width].

        `mask` broadcasts to [batch, 1, query, key]: of floats it is multiplicative and gradients reach it, of bools it is
        exact (True = attend).
        """
        query, key, value = (
            split_heads(layer(of), self.heads) for layer, of in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        return self.proj(merge_heads(_attend(query, key, value, mask)))


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """Softmax attention of [batch, head, position, channel]; `mask` of bools broadcasts to [batch, head, query, key].

    Fewer heads of keys and values than of queries is grouped-query attention. Where gradients are asked for on a CPU it is computed in
    fp32: torch's backward pass in bf16 is several times slower there.
    """
    grouped = key.shape[1] != query.shape[1]
    on_cpu = query.device.type == "cpu"
    plain = not (query.requires_grad or grouped or causal or mask is not None)
    if on_cpu and plain and query.dtype == torch.bfloat16 and key.shape[2] >= MANY_POSITIONS:
        return _attend_by_image(query, key, value)
    if not on_cpu or not query.requires_grad:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    with torch.autocast("cpu", enabled=False):
        attended = F.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), attn_mask=mask, is_causal=causal, enable_gqa=grouped
        )
    return attended.to(value.dtype)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, position, width] to [batch, head, position, width / head]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """The inverse of `split_heads`."""
    return x.transpose(1, 2).flatten(2)


def _attend_by_image(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """In bf16 on a CPU, at a few hundred positions, two products whose scores stay in the cache are over twice as fast as the kernel."""
    scale = query.shape[-1] ** -0.5
    none = query.new_zeros(1, 1, 1)
    outputs = []
    for of_query, of_key, of_value in zip(query, key, value, strict=True):
        scores = torch.baddbmm(none, of_query, of_key.transpose(-2, -1), beta=0, alpha=scale)
        outputs.append(scores.softmax(-1) @ of_value)
    return torch.stack(outputs)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or mask.dtype == torch.bool:
        return attention(query, key, value, mask)
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    return masked_softmax(scores, mask).to(value.dtype) @ value
