"""The merger's attention on kept patches alone: images packed one after another, no masks, nothing computed for dropped queries.

On a GPU in half precision one variable-length kernel takes all images. Elsewhere each image is attended to by itself: nothing is
padded or gathered, and what an image gets can't hang on its company; but where gradients are asked for they are padded to the longest
and attended to together, which takes far fewer operators. There the softmax is the released one, (exp(s - max s) x mask
+ eps / keys) / (sum + eps), whose maximum and eps also run over keys that aren't attended to (`attention.masked_softmax`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lavit_dist.models.attention import POLICY_EPS
from lavit_dist.models.variable_length import ends_of, has_variable_length_kernel, variable_length_attention


@dataclass(frozen=True)
class PackedMemory:
    """The encoder's features as cross-attention reads them, the same in every block, and how many patches each image keeps."""

    keys_of: Tensor
    """[batch, patch, width], each image's dropped patches first; the kept ones have a say in the maximum of the scores."""
    values_of: Tensor
    """[batch + dropped, width]: the mean of each image's patches, which is what eps adds, then the dropped patches of all images."""
    kept: list[int]
    """Kept patches per image."""
    dropped: list[int]
    """Dropped patches per image."""

    @classmethod
    def of(cls, memory: Tensor, keep_mask: Tensor) -> PackedMemory:
        """Of features [batch, patch, width] and a `keep_mask` [batch, patch] of bools."""
        order = keep_mask.byte().argsort(dim=-1, stable=True)
        keys_of = memory.gather(1, order[..., None].expand_as(memory))
        kept = keep_mask.sum(-1).tolist()
        dropped = [keep_mask.shape[1] - count for count in kept]
        packed = [image[:count] for image, count in zip(keys_of, dropped, strict=True)]
        return cls(keys_of, torch.cat([memory.mean(1), *packed]), kept, dropped)


def attention_among_kept(query: Tensor, key: Tensor, value: Tensor, kept: list[int]) -> Tensor:
    """Causal attention within each image, [token, head, channel]; `query`, `key` and `value` are of that shape too."""
    if has_variable_length_kernel(query):
        return _variable_length(query, key, value, kept, kept, causal=True)
    if query.requires_grad:
        q, k, v = (_padded(of, kept) for of in (query, key, value))
        there = _there(kept, query)
        mean = (v * there[..., None, None]).sum(1) / there.sum(1).clamp_min(1)[:, None, None]
        return (
            _attend_padded(q, k, there, v, there, mean, causal=True).flatten(0, 1).index_select(0, there.flatten().nonzero()[:, 0])
        )
    parts = zip(query.split(kept), key.split(kept), value.split(kept), strict=True)
    return torch.cat([_attend(q, k, v, v.mean(0), causal=True) for q, k, v in parts])


def attention_to_dropped(query: Tensor, key: Tensor, value: Tensor, memory: PackedMemory) -> Tensor:
    """Attention of kept patches to the dropped ones of their image, [token, head, channel].

    `query` [token, head, channel]; `key` [batch, patch, head, channel] and `value` [batch + dropped, head, channel] are
    projections of `memory`. Where nothing is dropped the mean value is what is left, as released.
    """
    means, values = value[: len(key)], value[len(key) :].split(memory.dropped)
    if has_variable_length_kernel(query):
        # The mean takes the place of dropped patches where there are none; of a single key the score does not matter.
        counts = [max(count, 1) for count in memory.dropped]
        keys = torch.cat([of_image[:count] for of_image, count in zip(key, counts, strict=True)])
        filled = torch.cat([of_image if len(of_image) else mean[None] for of_image, mean in zip(values, means, strict=True)])
        return _variable_length(query, keys, filled, memory.kept, counts, causal=False)
    if query.requires_grad:
        everywhere = torch.ones(key.shape[:2], dtype=torch.bool, device=key.device)
        padded, dropped = _padded(value[len(key) :], memory.dropped), _there(memory.dropped, query)
        attended = _attend_padded(_padded(query, memory.kept), key, everywhere, padded, dropped, means, causal=False)
        return attended.flatten(0, 1).index_select(0, _there(memory.kept, query).flatten().nonzero()[:, 0])
    parts = zip(query.split(memory.kept), key, values, means, strict=True)
    return torch.cat([_attend(q, k, v, mean, causal=False) for q, k, v, mean in parts])


def _attend(query: Tensor, key: Tensor, value: Tensor, mean: Tensor, *, causal: bool) -> Tensor:
    """The released softmax of one image over its first keys, those that have a value; `mean` [head, channel] is that of all."""
    scores = (query * query.shape[-1] ** -0.5).transpose(0, 1) @ key.permute(1, 2, 0)  # [head, query, key]
    scores = scores.float()
    weights = (scores[..., : len(value)] - scores.amax(-1, keepdim=True)).exp()
    if causal:
        weights = weights.tril()
    total = weights.sum(-1, keepdim=True) + POLICY_EPS
    summed = weights.to(value.dtype) @ value.transpose(0, 1) + POLICY_EPS * mean[:, None]
    return (summed / total).to(query.dtype).transpose(0, 1)


def _attend_padded(
    query: Tensor, key: Tensor, key_there: Tensor, value: Tensor, value_there: Tensor, mean: Tensor, *, causal: bool
) -> Tensor:
    """`_attend` for all images at once, [batch, query, head, channel]; bools say which keys and values are no padding."""
    scores = (query * query.shape[-1] ** -0.5).transpose(1, 2) @ key.permute(0, 2, 3, 1)  # [batch, head, query, key]
    scores = scores.float().masked_fill(~key_there[:, None, None], -torch.inf)
    weights = (scores[..., : value.shape[1]] - scores.amax(-1, keepdim=True)).exp() * value_there[:, None, None]
    if causal:
        weights = weights.tril()
    total = weights.sum(-1, keepdim=True) + POLICY_EPS
    summed = weights.to(value.dtype) @ value.transpose(1, 2) + POLICY_EPS * mean[:, :, None]
    return (summed / total).to(query.dtype).transpose(1, 2)


def _padded(packed: Tensor, lengths: list[int]) -> Tensor:
    """[position, ...] of all images, one after another, to [batch, longest, ...]; in one operator, filled up by other positions."""
    counts = torch.tensor(lengths, device=packed.device)
    places = (counts.cumsum(0) - counts)[:, None] + torch.arange(max(lengths), device=packed.device)
    if not len(packed):
        return packed.new_zeros(*places.shape, *packed.shape[1:])
    return packed.index_select(0, places.clamp_max(len(packed) - 1).flatten()).unflatten(0, places.shape)


def _there(lengths: list[int], like: Tensor) -> Tensor:
    """Bools [batch, longest]: what is no padding."""
    counts = torch.tensor(lengths, device=like.device)
    return torch.arange(max(lengths), device=like.device) < counts[:, None]


def _variable_length(query: Tensor, key: Tensor, value: Tensor, queries: list[int], keys: list[int], *, causal: bool) -> Tensor:
    """Exact softmax without eps, of `queries` and `keys` packed positions per image."""
    ends = ends_of(queries, query.device), ends_of(keys, query.device)
    return variable_length_attention(query, key, value, *ends, (max(queries), max(keys)), causal=causal)
