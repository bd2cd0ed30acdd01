"""The cut into pipeline stages covers every layer once, and no other cut has a faster slowest stage."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.config.model import LlamaConfig
from lavit_dist.config.pretrain import ActivationCheckpointingConfig
from lavit_dist.models.llama import training_flops
from lavit_dist.parallel.stages import describe, layer_costs, partition

KEEP = ActivationCheckpointingConfig()
SMALL = LlamaConfig(hidden_size=64, num_layers=8, num_attention_heads=4, num_key_value_heads=2, ffn_hidden_size=128)
costs_and_stages = st.lists(st.integers(0, 100), min_size=1, max_size=9).flatmap(
    lambda costs: st.tuples(st.just(costs), st.integers(1, len(costs)))
)


def slowest(costs: list[int], bounds: list[int]) -> int:
    return max(sum(costs[start:end]) for start, end in pairwise(bounds))


@given(costs_and_stages)
def test_stages_are_consecutive_and_none_is_empty(case: tuple[list[int], int]) -> None:
    costs, num_stages = case
    bounds = partition(costs, num_stages)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, len(costs), num_stages + 1)
    assert all(start < end for start, end in pairwise(bounds))


@given(costs_and_stages)
def test_no_cut_has_a_faster_slowest_stage(case: tuple[list[int], int]) -> None:
    costs, num_stages = case
    others = ([0, *cuts, len(costs)] for cuts in combinations(range(1, len(costs)), num_stages - 1))
    assert slowest(costs, partition(costs, num_stages)) == min(slowest(costs, other) for other in others)


@pytest.mark.parametrize("seq_len", [1, 128, 2048])
def test_costs_add_up_to_the_operations_of_training(seq_len: int) -> None:
    expected = training_flops(SMALL, 512, tokens=1, attended=(seq_len + 1) / 2)
    assert sum(layer_costs(SMALL, 512, seq_len, KEEP)[1:]) == pytest.approx(expected)


def test_the_vocabulary_counts_where_it_is_multiplied_not_where_it_is_looked_up() -> None:
    """Counted by weights, both ends would be alike; a large head leaves its stage fewer blocks."""
    start, *_, head = layer_costs(SMALL, 16384, 128, KEEP)
    assert start < 0.01 * head
    bounds = partition(layer_costs(SMALL, 16384, 128, KEEP), 2)
    assert bounds == [0, 9, 10]
    assert partition(layer_costs(SMALL, 512, 128, KEEP), 2) == [0, 5, 10]


@pytest.mark.parametrize(("every", "recomputed"), [(1, [0, 1, 2, 3]), (2, [1, 3]), (4, [3])])
def test_recomputed_blocks_cost_a_third_more(every: int, recomputed: list[int]) -> None:
    plain = layer_costs(SMALL, 512, 128, KEEP)
    again = layer_costs(SMALL, 512, 128, ActivationCheckpointingConfig(mode="full", every=every))
    ratios = [after / before for before, after in zip(plain, again, strict=True)]
    assert ratios[1:5] == pytest.approx([4 / 3 if index in recomputed else 1 for index in range(4)])
    assert ratios[0] == ratios[-1] == 1


def test_the_log_line_names_every_stage() -> None:
    assert describe([0, 3, 4], [1.0, 1.0, 1.0, 1.0]) == (
        "pipeline stages of 4 layers, by share of computation: 0: layers 0-2 (75.0%), 1: layers 3-3 (25.0%)"
    )
