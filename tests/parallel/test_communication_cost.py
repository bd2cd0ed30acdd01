"""What a layout must send, where arithmetic has the answer."""

from dataclasses import replace

import pytest

from lavit_dist.config.model import LlamaConfig
from lavit_dist.models.llama import block_parameters
from lavit_dist.parallel.communication_cost import Stage, StepSizes, data_traffic, least_traffic, rank_weights, stages_of
from lavit_dist.parallel.topology import Layout

MODEL = LlamaConfig(hidden_size=64, num_layers=4, num_attention_heads=4, num_key_value_heads=2, ffn_hidden_size=128)
SIZES = StepSizes(MODEL, vocabulary_size=256, micro_batch_tokens=100, micro_batches=3, element_bytes=4, zero_stage=1)
WHOLE = Stage(blocks=4, is_first=True, is_last=True)


def test_one_process_sends_nothing():
    assert least_traffic(SIZES, Layout(1, 1, 1), WHOLE) == (0, 0, 0)


def test_stages_cover_all_blocks_once():
    stages = stages_of([0, 2, 3, 6])
    assert [stage.blocks for stage in stages] == [1, 1, 2]
    assert [(stage.is_first, stage.is_last) for stage in stages] == [(True, False), (False, False), (False, True)]


def test_stages_and_tensor_ranks_hold_the_model_and_every_norm():
    width = MODEL.hidden_size
    whole = 4 * block_parameters(MODEL) + 2 * 256 * width + width
    assert rank_weights(SIZES, 1, WHOLE) == whole
    assert sum(rank_weights(SIZES, 1, stage) for stage in stages_of([0, 3, 6])) == whole
    norms = (2 * 4 + 1) * width
    assert 2 * rank_weights(SIZES, 2, WHOLE) == whole + norms


def test_sharing_out_the_optimizer_costs_as_much_as_an_all_reduce_in_fp32_and_less_in_bf16():
    weights = rank_weights(SIZES, 1, WHOLE)
    all_reduce = data_traffic(replace(SIZES, zero_stage=0), 8, weights)
    assert data_traffic(SIZES, 8, weights) == all_reduce
    assert data_traffic(replace(SIZES, element_bytes=2), 8, weights) == pytest.approx(0.75 * all_reduce)


def test_every_boundary_of_a_pipeline_is_crossed_once_each_way_per_micro_batch():
    sent = sum(least_traffic(SIZES, Layout(1, 3, 1), stage).pipe for stage in stages_of([0, 2, 4, 6]))
    assert sent == 2 * 2 * 3 * 100 * 64 * 4
