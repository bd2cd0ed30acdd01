"""The variable-length attention kernel of GPUs, which takes documents of any lengths laid end to end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def has_variable_length_kernel(query: Tensor) -> bool:
    """Whether there is a kernel for tensors like `query`: on GPUs in half precision."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


def variable_length_attention(
    query: Tensor, key: Tensor, value: Tensor, query_ends: Tensor, key_ends: Tensor, longest: tuple[int, int], *, causal: bool
) -> Tensor:
    """Softmax attention within each document, [position, head, channel], of `query`, `key` and `value` of that shape.

    `query_ends` and `key_ends` [document + 1] int32 are the first position of each document, and the total; `longest` are the most
    queries and keys of a document. Fewer heads of keys and values than of queries is grouped-query attention.
    """
    from torch.nn.attention.varlen import varlen_attn

    channels = query.shape[-1]
    if channels % 8:  # the kernel takes multiples of 8
        query, key, value = (F.pad(of, (0, -channels % 8)) for of in (query, key, value))
    out = varlen_attn(
        query, key, value, query_ends, key_ends, *longest,
        scale=channels**-0.5, window_size=(-1, 0) if causal else (-1, -1), enable_gqa=key.shape[1] != query.shape[1],
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out[..., :channels]


def ends_of(counts: list[int], device: torch.device) -> Tensor:
    """The first position of each of so many documents and the total, [document + 1] int32."""
    return F.pad(torch.tensor(counts, dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32), (1, 0))
