"""Cutting weights over tensor ranks loses nothing, and each rank gets whole heads."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.config.base import build
from lavit_dist.config.model import LlamaConfig
from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.errors import UserError
from lavit_dist.models.llama import block_name, block_shapes, initial_weight
from lavit_dist.models.vocabulary import Table
from lavit_dist.parallel.llama_shards import GATE_UP, QKV, cut_block, cut_table, join_block, join_table

HEAD_DIM = 4


def model(heads: int, groups: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=heads * HEAD_DIM, num_attention_heads=heads, num_key_value_heads=groups, ffn_hidden_size=24, num_layers=2
    )


def block(config: LlamaConfig) -> dict[str, torch.Tensor]:
    shapes = block_shapes(config).items()
    return {name: initial_weight(config, block_name(0, name), shape, seed=3) for name, shape in shapes}


@pytest.mark.parametrize("groups", [8, 4])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_joined_shares_are_the_whole(groups: int, size: int) -> None:
    config = model(8, groups)
    whole = block(config)
    joined = join_block([cut_block(whole, config, rank, size) for rank in range(size)], config)
    assert joined.keys() == whole.keys()
    assert all(torch.equal(joined[name], whole[name]) for name in whole)


def test_a_rank_holds_its_groups_queries_keys_and_values_together() -> None:
    config = model(heads=4, groups=2)
    whole = block(config)
    share = cut_block(whole, config, rank=1, size=2)
    queries, keys, values = (whole[f"self_attn.{part}_proj.weight"] for part in "qkv")
    expected = torch.cat([queries[2 * HEAD_DIM :], keys[HEAD_DIM:], values[HEAD_DIM:]])
    assert torch.equal(share[QKV], expected)
    gate, up = whole["mlp.gate_proj.weight"], whole["mlp.up_proj.weight"]
    assert torch.equal(share[GATE_UP], torch.cat([gate[12:], up[12:]]))


@given(st.integers(1, 300), st.sampled_from([1, 2, 4, 8]))
def test_table_rows_are_shared_out_in_order(rows: int, size: int) -> None:
    table = Table("text", 0, rows)
    whole = torch.randn(rows, 3)
    shares = [cut_table(whole, table, rank, size) for rank in range(size)]
    assert {len(share) for share in shares} == {table.padded_size // size}
    assert torch.equal(join_table(shares, table), whole)
    assert not torch.cat(shares)[rows:].any()


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    config = model(4, 4)
    name, shape = block_name(1, "mlp.down_proj.weight"), (16, 24)
    first = initial_weight(config, name, shape, seed=0)
    torch.manual_seed(99)
    assert torch.equal(first, initial_weight(config, name, shape, seed=0))
    assert not torch.equal(first, initial_weight(config, name, shape, seed=1))
    assert not torch.equal(first, initial_weight(config, block_name(0, "mlp.down_proj.weight"), shape, seed=0))
    assert first.std() == pytest.approx(config.init_std / 2, rel=0.2)  # two layers: sqrt(2 x 2)


RELEASED = {
    "Llama-2-70B": {
        "hidden_size": 8192,
        "num_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "ffn_hidden_size": 28672,
    },
    "Llama-3-8B": {
        "hidden_size": 4096,
        "num_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "ffn_hidden_size": 14336,
    },
}


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", RELEASED)
def test_released_grouped_query_shapes_are_shared_out_evenly(name: str, size: int) -> None:
    config = LlamaConfig(**RELEASED[name])
    width, head, hidden = config.hidden_size, 128, config.ffn_hidden_size
    whole = {name: torch.empty(shape, device="meta") for name, shape in block_shapes(config).items()}
    shares = [cut_block(whole, config, rank, size) for rank in range(size)]
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) // size
    for share in shares:
        assert {weight: tuple(tensor.shape) for weight, tensor in share.items()} == {
            "input_layernorm.weight": (width,),
            QKV: (heads * head, width),
            "self_attention.linear_proj.weight": (width, width // size),
            "pre_mlp_layernorm.weight": (width,),
            GATE_UP: (2 * hidden // size, width),
            "mlp.linear_fc2.weight": (width, hidden // size),
        }
    joined = join_block(shares, config)
    assert {weight: tensor.shape for weight, tensor in joined.items()} == {weight: tensor.shape for weight, tensor in whole.items()}


@given(groups=st.sampled_from([1, 2, 4, 8]), per_group=st.sampled_from([1, 2, 8]), power=st.integers(0, 3))
def test_every_query_is_on_the_rank_of_its_keys(groups: int, per_group: int, power: int) -> None:
    """Each weight is filled with the number of its key-value group: a rank's groups are its own, queries, key and value in turn."""
    size = min(2**power, groups)
    config = model(groups * per_group, groups)
    whole = {name: torch.zeros(shape) for name, shape in block_shapes(config).items()}
    for part in "qkv":
        weight = whole[f"self_attn.{part}_proj.weight"]
        weight.copy_(torch.arange(groups).repeat_interleave(len(weight) // groups)[:, None].expand_as(weight))
    for rank in range(size):
        by_group = cut_block(whole, config, rank, size)[QKV].view(groups // size, (per_group + 2) * HEAD_DIM, -1)
        expected = torch.arange(groups).chunk(size)[rank].float()
        assert (by_group == expected[:, None, None]).all()


@pytest.mark.parametrize("name", RELEASED)
def test_more_processes_than_key_value_heads_are_refused_with_what_is_legal(name: str) -> None:
    settings = {"run_dir": "r", "ids": "i", "text_tokenizer": "t", "total_steps": 1, "global_batch_size": 1, "micro_batch_size": 1}
    settings |= {"model": RELEASED[name]}
    build(PretrainConfig, settings | {"parallel": {"tensor_parallel_size": 8}})
    sentence = r"model\.num_key_value_heads 8 can't be shared out to .*tensor_parallel_size 16 .* to 8, which divides"
    with pytest.raises(UserError, match=sentence):
        build(PretrainConfig, settings | {"parallel": {"tensor_parallel_size": 16}})
