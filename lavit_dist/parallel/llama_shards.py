"""How a LLaMA's weights are cut over tensor-parallel ranks, and put together again: plain tensor work, without any process.

megatron-core keeps query, key and value in one matrix, interleaved by key-value group, and gate and up in another. Each such
matrix is here a "whole" tensor with one axis along which ranks take equal shares: cutting is `chunk`, joining is `cat`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lavit_dist.config.model import LlamaConfig
from lavit_dist.models.vocabulary import Table

Weights = Mapping[str, Tensor]
QKV, GATE_UP = "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"
SHARD_AXIS = {QKV: 0, "self_attention.linear_proj.weight": 1, GATE_UP: 1, "mlp.linear_fc2.weight": 1}
"""Axis of each whole tensor that is shared out; weights that are not named are the same on every rank."""
SAME_TENSOR = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
"""megatron-core's name to Hugging Face's, where the tensor is the same."""


def cut_block(weights: Weights, model: LlamaConfig, rank: int, size: int) -> dict[str, Tensor]:
    """Rank `rank` of `size`'s share of a decoder block, under megatron-core's names, from its Hugging Face weights."""
    width = model.hidden_size
    by_group = (weights[f"self_attn.{part}_proj.weight"].view(model.num_key_value_heads, -1, width) for part in "qkv")
    whole = {ours: weights[theirs] for ours, theirs in SAME_TENSOR.items()}
    whole[QKV] = torch.cat(list(by_group), dim=1)
    whole[GATE_UP] = torch.stack([weights["mlp.gate_proj.weight"], weights["mlp.up_proj.weight"]])
    return {name: _share(tensor, SHARD_AXIS.get(name), rank, size) for name, tensor in whole.items()}


def join_block(shares: Sequence[Weights], model: LlamaConfig) -> dict[str, Tensor]:
    """The inverse of `cut_block` over all ranks' shares, in the order of ranks."""
    width, groups, head_dim = model.hidden_size, model.num_key_value_heads, model.head_width
    local_shape = {QKV: (groups // len(shares), -1, width), GATE_UP: (2, -1, width)}
    whole = {}
    for name in (*SAME_TENSOR, QKV, GATE_UP):
        parts = [share[name].view(local_shape.get(name, share[name].shape)) for share in shares]
        whole[name] = torch.cat(parts, dim=SHARD_AXIS[name]) if name in SHARD_AXIS else parts[0]
    heads_width = model.num_attention_heads // groups * head_dim
    query, key, value = whole[QKV].split([heads_width, head_dim, head_dim], dim=1)
    weights = {theirs: whole[ours] for ours, theirs in SAME_TENSOR.items()}
    weights |= {
        f"self_attn.{part}_proj.weight": tensor.reshape(-1, width) for part, tensor in zip("qkv", (query, key, value), strict=True)
    }
    weights |= {f"mlp.{part}_proj.weight": tensor for part, tensor in zip(("gate", "up"), whole[GATE_UP], strict=True)}
    return weights


def cut_table(whole: Tensor, table: Table, rank: int, size: int) -> Tensor:
    """Rank `rank` of `size`'s rows of `whole` [table.size, width], padded with zeros to equal shares."""
    share = table.padded_size // size
    mine = whole[rank * share : (rank + 1) * share]
    return F.pad(mine, (0, 0, 0, share - len(mine)))


def join_table(shares: Sequence[Tensor], table: Table) -> Tensor:
    """The inverse of `cut_table`: [table.size, width]."""
    return torch.cat(list(shares))[: table.size]


def _share(tensor: Tensor, axis: int | None, rank: int, size: int) -> Tensor:
    share = tensor if axis is None else tensor.chunk(size, dim=axis)[rank]
    return share.flatten(0, 1) if share.dim() == 3 else share
