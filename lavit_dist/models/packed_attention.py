"""Causal attention over packed rows: a document attends only to itself, and no mask of row by row is ever built.

On a GPU in half precision one variable-length kernel takes all documents. Elsewhere documents of like length are gathered into
small batches, padded at their ends, where causality alone keeps the padding out; a block mask over whole rows would pay for every
pair of documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lavit_dist.models.attention import attention
from lavit_dist.models.variable_length import has_variable_length_kernel, variable_length_attention


@dataclass(frozen=True)
class PackedDocuments:
    """Where the documents of a micro-batch lie; positions are flat indices into [seq, batch], whose batch axis is innermost."""

    starts: Tensor
    """[document] int64: the first position of each document when rows are laid end to end."""
    lengths: Tensor
    """[document] int64."""
    shape: tuple[int, int]
    """Rows, and positions of a row."""
    max_length: int
    """Tokens of the longest document."""

    @classmethod
    def of(cls, document_ids: Tensor) -> PackedDocuments:
        """Finds the documents in `document_ids` [batch, seq] of any integers: a new document starts where the number changes."""
        is_start = torch.ones_like(document_ids, dtype=torch.bool)
        is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        starts = is_start.flatten().nonzero().squeeze(1)
        lengths = torch.cat([starts[1:], starts.new_tensor([document_ids.numel()])]) - starts
        batch, seq = document_ids.shape
        return cls(starts, lengths, (batch, seq), int(lengths.max()))

    @cached_property
    def cumulative_lengths(self) -> Tensor:
        """[document + 1] int32: `starts`, and the total; what variable-length kernels take."""
        return F.pad(self.starts, (0, 1), value=self.shape[0] * self.shape[1]).to(torch.int32)

    @cached_property
    def buckets(self) -> tuple[Tensor, ...]:
        """Each [document, length] int64: documents of like length, their last position repeated to the longest among them."""
        batch, seq = self.shape
        buckets = []
        for chosen in self._alike():
            lengths = self.lengths[chosen, None]
            steps = torch.arange(int(lengths.max()), device=lengths.device).expand(len(lengths), -1)
            rowwise = self.starts[chosen, None] + torch.minimum(steps, lengths - 1)
            buckets.append(rowwise % seq * batch + rowwise // seq)
        return tuple(buckets)

    @cached_property
    def gathered(self) -> Tensor:
        """[position] int64: all buckets, end to end."""
        return torch.cat([positions.flatten() for positions in self.buckets])

    @cached_property
    def unpack(self) -> Tensor:
        """[seq x batch] int64: where in the flattened, concatenated buckets each position is found."""
        found, taken = torch.empty(self.shape[0] * self.shape[1], dtype=torch.int64, device=self.starts.device), 0
        for chosen, positions in zip(self._alike(), self.buckets, strict=True):
            within = torch.arange(positions.shape[1], device=positions.device) < self.lengths[chosen, None]
            found[positions[within]] = taken + within.flatten().nonzero().squeeze(1)
            taken += positions.numel()
        return found

    def _alike(self) -> list[Tensor]:
        """Masks [document] of documents whose lengths have the same power of two above them."""
        powers = self.lengths.double().log2().ceil()
        return [powers == power for power in powers.unique()]


def packed_attention(query: Tensor, key: Tensor, value: Tensor, documents: PackedDocuments) -> Tensor:
    """Attention of `query` [seq, batch, head, channel] to `key` and `value` [seq, batch, group, channel], within documents.

    Returns [seq, batch, head x channel]. Fewer groups than heads is grouped-query attention.
    """
    if has_variable_length_kernel(query):
        return _variable_length(query, key, value, documents)
    return _bucketed(query, key, value, documents)


def _variable_length(query: Tensor, key: Tensor, value: Tensor, documents: PackedDocuments) -> Tensor:
    seq, batch = query.shape[:2]
    query, key, value = (t.transpose(0, 1).flatten(0, 1) for t in (query, key, value))
    lengths, longest = documents.cumulative_lengths, documents.max_length
    out = variable_length_attention(query, key, value, lengths, lengths, (longest, longest), causal=True)
    return out.unflatten(0, (batch, seq)).transpose(0, 1).flatten(2)


def _bucketed(query: Tensor, key: Tensor, value: Tensor, documents: PackedDocuments) -> Tensor:
    seq, batch, heads, channels = query.shape
    sizes = [positions.numel() for positions in documents.buckets]
    in_buckets = [
        _Gather.apply(t.reshape(seq * batch, -1), documents.gathered, documents.unpack).split(sizes) for t in (query, key, value)
    ]
    outputs = []
    for positions, *of_bucket in zip(documents.buckets, *in_buckets, strict=True):
        q, k, v = (t.view(*positions.shape, -1, channels).transpose(1, 2) for t in of_bucket)  # [document, head, length, channel]
        out = attention(q, k, v, causal=True)
        outputs.append(out.transpose(1, 2).reshape(-1, heads * channels))
    return torch.cat(outputs).index_select(0, documents.unpack).view(seq, batch, heads * channels).to(query.dtype)


class _Gather(torch.autograd.Function):
    """Rows at `gathered`, of which the rest, beyond those at `unpack`, are padding whose gradient is 0: so backward is to gather, too.

    It is 0 because nothing is done with what padding attends to, and causality keeps documents from attending to padding.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gathered: Tensor, unpack: Tensor) -> Tensor:
        ctx.save_for_backward(unpack)
        return rows.index_select(0, gathered)

    @staticmethod
    def backward(ctx: Any, *of_gathered: Tensor) -> tuple[Tensor, None, None]:
        (unpack,) = ctx.saved_tensors
        return of_gathered[0].index_select(0, unpack), None, None
