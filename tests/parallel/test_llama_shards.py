"""Cutting weights over tensor ranks loses nothing, and each rank gets whole heads."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.config.model import LlamaConfig
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
