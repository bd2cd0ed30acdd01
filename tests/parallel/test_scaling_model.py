"""The scaling model at its limits."""

from dataclasses import replace

import pytest

from lavit_dist.config.model import LlamaConfig
from lavit_dist.models.llama import training_flops
from lavit_dist.parallel.communication_cost import Stage, StepSizes, rank_weights
from lavit_dist.parallel.scaling_model import Machine, memory_bytes, stage_flops, stage_memory, step_time
from lavit_dist.parallel.topology import Layout

MODEL = LlamaConfig(hidden_size=64, num_layers=4, num_attention_heads=4, num_key_value_heads=4, ffn_hidden_size=128)
SIZES = StepSizes(MODEL, vocabulary_size=256, micro_batch_tokens=100, micro_batches=6, element_bytes=2, zero_stage=1)
WHOLE = [Stage(blocks=4, is_first=True, is_last=True)]
MACHINE = Machine(
    peak_flops=1e12, efficiency=0.5, memory_bytes=1e9, memory_bandwidth=1e12, node_size=8,
    node_bandwidth=1e11, network_bandwidth=1e10, node_latency=1e-6, network_latency=1e-5,
)  # fmt: skip
CONTEXT = 30.0


def test_one_gpu_computes_at_its_efficiency():
    time = step_time(SIZES, Layout(1, 1, 1), WHOLE, MACHINE, CONTEXT)
    flops = training_flops(MODEL, 256, 600, 600 * CONTEXT)
    assert 6 * stage_flops(SIZES, WHOLE[0], CONTEXT) == pytest.approx(flops)
    assert time.compute == pytest.approx(flops / 0.5e12)
    assert time.total == time.compute + time.optimizer


def test_equal_stages_with_free_messages_idle_for_the_bubble():
    stages = [Stage(1, False, False)] * 4
    free = replace(MACHINE, node_bandwidth=float("inf"), node_latency=0.0)
    time = step_time(SIZES, Layout(1, 4, 1), stages, free, CONTEXT)
    assert time.bubble / (time.compute + time.bubble) == pytest.approx(3 / (6 + 3))


def test_leaving_the_node_costs_time():
    inside, outside = (step_time(SIZES, Layout(1, 1, data), WHOLE, MACHINE, CONTEXT).data for data in (8, 9))
    assert outside > 9 * inside


def test_sharing_out_more_takes_less_memory():
    by_stage = [memory_bytes(replace(SIZES, zero_stage=stage), Layout(1, 1, 8), WHOLE) for stage in range(4)]
    assert by_stage == sorted(by_stage, reverse=True)
    assert len(set(by_stage)) == 4


def test_memory_of_a_rank_is_what_its_parts_add_up_to():
    (stage,) = stage_memory(SIZES, Layout(1, 1, 8), WHOLE)
    weights = rank_weights(SIZES, 1, WHOLE[0])
    assert stage.state == pytest.approx((2 + 4 + 12 / 8) * weights)
    assert stage.reduced == pytest.approx(4 / 8 * weights)
    assert stage.head == 4 * 256 * 64
    assert memory_bytes(SIZES, Layout(1, 1, 8), WHOLE) == stage.state + stage.activations + stage.head + stage.reduced


def test_only_last_stages_hold_the_heads_gradients_and_nothing_is_reduced_alone():
    stages = stage_memory(SIZES, Layout(1, 2, 1), [Stage(2, True, False), Stage(2, False, True)])
    assert [stage.head > 0 for stage in stages] == [False, True]
    assert not any(stage.reduced for stage in stages)
