"""Attention over packed rows by NVIDIA's Transformer Engine, where it is installed; `models/packed_attention.py` is what runs otherwise.

It chooses among cuDNN's fused kernel and FlashAttention for a GPU. Written against its documentation, and tested with a module that stands
in for it: it has not been run here.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from lavit_dist.errors import check
from lavit_dist.models.packed_attention import PackedDocuments


def check_transformer_engine(precision: str) -> None:
    """Raises `UserError` unless Transformer Engine is installed, on a GPU, and has half-precision numbers to attend to."""
    check(
        importlib.util.find_spec("transformer_engine") is not None and torch.cuda.is_available() and precision == "bf16",
        "attention transformer_engine needs a GPU, precision bf16 and NVIDIA's library (pip install 'transformer_engine[pytorch]');"
        " set attention to torch.",
    )


class TransformerEngineAttention:
    """What `packed_attention` computes, by Transformer Engine, for a number of heads and of key-value groups.

    It is no module of ours, because the one that it holds has no weights but would add a key to every checkpoint.
    """

    def __init__(self, heads: int, groups: int, channels: int) -> None:
        from transformer_engine.pytorch import DotProductAttention

        self._attend = DotProductAttention(
            num_attention_heads=heads,
            kv_channels=channels,
            num_gqa_groups=groups,
            attention_dropout=0.0,
            qkv_format="thd",
            attn_mask_type="padding_causal",
        )

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, documents: PackedDocuments) -> Tensor:
        """`query` [seq, batch, head, channel], `key` and `value` [seq, batch, group, channel]; returns [seq, batch, head x channel]."""
        seq, batch = query.shape[:2]
        query, key, value = (t.transpose(0, 1).flatten(0, 1) for t in (query, key, value))  # rows end to end
        ends, longest = documents.cumulative_lengths, documents.max_length
        out: Tensor = self._attend(
            query, key, value, cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
        )
        return out.view(batch, seq, -1).transpose(0, 1)
