"""Which layers of the language model run on which pipeline stage, so that the slowest stage is as fast as can be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from lavit_dist.config.model import LlamaConfig
from lavit_dist.config.pretrain import ActivationCheckpointingConfig
from lavit_dist.models.llama import block_parameters

FORWARD_AND_BACKWARD = 3
"""The backward pass multiplies each matrix twice: for the gradient of its input and for that of its weights."""
PER_WEIGHT = 2
"""Floating-point operations of a weight per token and pass: a multiplication and an addition."""
PER_ATTENDED_POSITION = 4
"""Times the channels of all heads: a score and a weighted value per attended position."""
Taken = tuple[float, float, tuple[int, ...]]
"""Stages taken so far: the cost of the slowest, the sum of squared costs, and where each begins."""


def layer_costs(model: LlamaConfig, vocabulary_size: int, seq_len: int, recompute: ActivationCheckpointingConfig) -> list[float]:
    """Floating-point operations per token of the embedding, each block and the head, forward and backward.

    Documents are taken to be as long as a row, the most that attention can cost. The embedding is a look-up, and costs as much as
    adding its rows up; the head is the multiplication with the whole vocabulary and the loss over it.
    """
    attention = PER_ATTENDED_POSITION * model.num_attention_heads * model.head_width * (seq_len + 1) / 2
    block = PER_WEIGHT * block_parameters(model) + attention
    again = {"none": 0.0, "selective": attention, "full": block}[recompute.mode]
    blocks = [FORWARD_AND_BACKWARD * block + again * recompute.recomputes(index) for index in range(model.num_layers)]
    head = FORWARD_AND_BACKWARD * PER_WEIGHT * vocabulary_size * model.hidden_size
    return [float(FORWARD_AND_BACKWARD * model.hidden_size), *blocks, float(head)]


def partition(costs: Sequence[float], num_stages: int) -> list[int]:
    """Bounds [stage + 1] of consecutive layers, at least one each, whose most expensive stage is as cheap as can be.

    Among such partitions one that spreads the rest evenly: of the smallest sum of squares, stage by stage. (DeepSpeed's own
    `partition_balanced` makes the difference between stages small, not the slowest, for which all others wait.)
    """
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)
    best: dict[int, Taken] = {
        end: (before[end], before[end] ** 2, (0,)) for end in range(1, len(before))
    }  # by the number of layers taken so far
    for stage in range(1, num_stages):
        best = {
            end: min(_with_stage(best[start], start, before[end] - before[start]) for start in range(stage, end))
            for end in range(stage + 1, len(before))
        }
    return [*best[len(costs)][2], len(costs)]


def describe(bounds: Sequence[int], costs: Sequence[float]) -> str:
    """One line: the layers of each stage and its share of the whole cost."""
    stages = [
        f"{stage}: layers {start}-{end - 1} ({sum(costs[start:end]) / sum(costs):.1%})"
        for stage, (start, end) in enumerate(pairwise(bounds))
    ]
    return f"pipeline stages of {len(costs)} layers, by share of computation: {', '.join(stages)}"


def _with_stage(earlier: Taken, start: int, cost: float) -> Taken:
    slowest, squares, bounds = earlier
    return max(slowest, cost), squares + cost**2, (*bounds, start)
