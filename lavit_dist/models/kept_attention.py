"""Attention of the merger on kept patches only: images packed one after another, no masks, nothing computed for dropped queries.

It computes the released softmax, (exp(s - max s) x mask + eps / patches) / (sum + eps), whose maximum and whose eps run over all
patches of the image, kept or not (`attention.masked_softmax`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lavit_dist.models.attention import POLICY_EPS
from lavit_dist.models.packed_attention import PackedDocuments, has_variable_length_kernel


@dataclass(frozen=True)
class KeptPatches:
    """Which patches are kept, as the merger's packed layers need it."""

    documents: PackedDocuments
    """The kept patches of each image that has any."""
    counts: list[int]
    """Kept patches per image."""
    dropped_counts: list[int]
    """Dropped patches per image."""
    order: Tensor
    """[batch, patch] int64: the patches of each image, the dropped ones first, either kind in raster order."""

    @classmethod
    def of(cls, keep_mask: Tensor) -> KeptPatches:
        """Of a `keep_mask` [batch, patch] of bools with at least one True."""
        return cls(
            documents=PackedDocuments.of(keep_mask.nonzero()[None, :, 0]),
            counts=keep_mask.sum(-1).tolist(),
            dropped_counts=(~keep_mask).sum(-1).tolist(),
            order=keep_mask.byte().argsort(dim=-1, stable=True),
        )


@dataclass(frozen=True)
class PackedMemory:
    """The encoder's features as cross-attention reads them; the same in every block."""

    keys_of: Tensor
    """[batch, patch, width], each image's dropped patches first: all patches have a say in the maximum of the scores."""
    values_of: Tensor
    """[batch + dropped, width]: the mean of each image's patches, which is what eps adds, then the dropped patches of all images."""
    kept: KeptPatches

    @classmethod
    def of(cls, memory: Tensor, kept: KeptPatches) -> PackedMemory:
        """Of features [batch, patch, width]."""
        keys_of = memory.gather(1, kept.order[..., None].expand_as(memory))
        dropped = [image[:count] for image, count in zip(keys_of, kept.dropped_counts, strict=True)]
        return cls(keys_of, torch.cat([memory.mean(1), *dropped]), kept)


def attention_to_dropped(query: Tensor, key: Tensor, value: Tensor, kept: KeptPatches) -> Tensor:
    """Attention of kept patches to the dropped ones of their image, [token, head x channel].

    `query` [token, head, channel], `key` [batch, patch, head, channel] and `value` [batch + dropped, head, channel] are of
    `PackedMemory`. An image without dropped patches gets the mean of its values, as released. On a GPU in half precision, that is
    all that is kept of eps: see `TokenMerger.merge_kept` for what it is worth. Elsewhere the released softmax is exact.
    """
    attend = _variable_length if has_variable_length_kernel(query) else _by_image
    return attend(query, key, value, kept).flatten(1)


def _by_image(query: Tensor, key: Tensor, value: Tensor, kept: KeptPatches) -> Tensor:
    means, values = value[: len(key)], value[len(key) :].split(kept.dropped_counts)
    outputs = []
    for queries, keys, dropped, mean in zip(query.split(kept.counts), key, values, means, strict=True):
        scores = (queries * queries.shape[-1] ** -0.5).transpose(0, 1) @ keys.permute(1, 2, 0)  # [head, query, patch]
        scores = scores.float()
        weights = (scores[..., : len(dropped)] - scores.amax(-1, keepdim=True)).exp()
        total = weights.sum(-1, keepdim=True) + POLICY_EPS
        summed = weights.to(dropped.dtype) @ dropped.transpose(0, 1) + POLICY_EPS * mean[:, None]
        outputs.append((summed / total).to(query.dtype).transpose(0, 1))
    return torch.cat(outputs)


def _variable_length(query: Tensor, key: Tensor, value: Tensor, kept: KeptPatches) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    counts, dropped_counts = (torch.tensor(of, device=query.device) for of in (kept.counts, kept.dropped_counts))
    keys = torch.cat([image[:count] for image, count in zip(key, kept.dropped_counts, strict=True)])
    # The kernel takes heads of a multiple of 8 channels.
    packed = (F.pad(of, (0, -query.shape[-1] % 8)) for of in (query, keys, value[len(key) :]))
    ends = (F.pad(of.cumsum(0), (1, 0)).to(torch.int32) for of in (counts, dropped_counts))
    longest = max(kept.counts), max(kept.dropped_counts)
    out: Tensor = varlen_attn(*packed, *ends, *longest, scale=query.shape[-1] ** -0.5)  # type: ignore[assignment]
    whole = (dropped_counts == 0).repeat_interleave(counts)
    return torch.where(whole[:, None, None], value[: len(key)].repeat_interleave(counts, 0), out[..., : query.shape[-1]])
