"""Causal attention over packed rows: a document attends only to itself, and no mask of row by row is ever built.

On a GPU in half precision one variable-length kernel takes all documents. Elsewhere documents of like length are gathered into
small batches, padded at their ends, where causality alone keeps the padding out; a block mask over whole rows would pay for every
pair of documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lavit_dist.models.attention import attention
from lavit_dist.models.variable_length import has_variable_length_kernel, variable_length_attention


@dataclass(frozen=True)
class PackedDocuments:
    """Where the documents of a micro-batch lie; positions are flat indices into [seq, batch], whose batch axis is innermost."""

    cumulative_lengths: Tensor
    """[document + 1] int32: the first position of each document when rows are laid end to end, and the total."""
    max_length: int
    """Tokens of the longest document."""
    buckets: tuple[Tensor, ...]
    """Each [document, length] int64: documents of like length, their last position repeated to the longest among them."""
    unpack: Tensor
    """[seq x batch] int64: where in the flattened, concatenated buckets each position is found."""

    @classmethod
    def of(cls, document_ids: Tensor) -> PackedDocuments:
        """Finds the documents in `document_ids` [batch, seq] of any integers: a new document starts where the number changes."""
        batch, seq = document_ids.shape
        device = document_ids.device
        is_start = torch.ones(batch, seq, dtype=torch.bool, device=device)
        is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        starts = is_start.flatten().nonzero().squeeze(1)
        ends = torch.cat([starts[1:], starts.new_tensor([batch * seq])])
        lengths = ends - starts
        buckets, slots, taken = [], torch.empty(batch * seq, dtype=torch.int64, device=device), 0
        powers = lengths.double().log2().ceil()
        for power in powers.unique():
            chosen = powers == power
            longest = int(lengths[chosen].max())
            steps = torch.arange(longest, device=device).expand(int(chosen.sum()), -1)
            within = steps < lengths[chosen, None]
            rowwise = starts[chosen, None] + torch.minimum(steps, lengths[chosen, None] - 1)
            positions = rowwise % seq * batch + rowwise // seq
            slots[positions[within]] = taken + within.flatten().nonzero().squeeze(1)
            buckets.append(positions)
            taken += positions.numel()
        cumulative = torch.cat([starts, ends[-1:]]).to(torch.int32)
        return cls(cumulative, int(lengths.max()), tuple(buckets), slots)


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
    flat = [t.reshape(seq * batch, -1) for t in (query, key, value)]
    outputs = []
    for positions in documents.buckets:
        q, k, v = (
            t.index_select(0, positions.flatten()).view(*positions.shape, -1, channels).transpose(1, 2) for t in flat
        )  # each [document, head, length, channel]
        out = attention(q, k, v, causal=True)
        outputs.append(out.transpose(1, 2).reshape(-1, heads * channels))
    return torch.cat(outputs).index_select(0, documents.unpack).view(seq, batch, heads * channels).to(query.dtype)
