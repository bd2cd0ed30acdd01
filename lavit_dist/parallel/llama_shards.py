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


TABLES = ("text", "visual", "projection.text", "projection.visual")
"""Tables of embedding and head, below the number of their layer: their rows, padding included, are shared out."""


def join_shares(name: str, shares: Sequence[Tensor], model: LlamaConfig) -> Tensor:
    """The whole tensor of the parameter `name` of the list of layers (`0.text`, `3.layer.mlp.linear_fc1.weight`, …) from all ranks' shares."""
    below = _below_layer(name)
    axis = 0 if below in TABLES else SHARD_AXIS.get(below)
    if axis is None:
        return shares[0]
    local = {QKV: (model.num_key_value_heads // len(shares), -1, model.hidden_size), GATE_UP: (2, -1, model.hidden_size)}
    return torch.cat([share.view(local.get(below, share.shape)) for share in shares], dim=axis)


def cut_share(name: str, whole: Tensor, rank: int, size: int) -> Tensor:
    """Rank `rank` of `size`'s share of a tensor that `join_shares` gave."""
    below = _below_layer(name)
    return _share(whole, 0 if below in TABLES else SHARD_AXIS.get(below), rank, size)


def _below_layer(name: str) -> str:
    return name.partition(".")[2].removeprefix("layer.")


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
    whole = {
        name: join_shares(f"0.layer.{name}", [share[name] for share in shares], model) for name in (*SAME_TENSOR, QKV, GATE_UP)
    }
    whole[QKV] = whole[QKV].view(groups, -1, width)
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
