"""The least that a rank must send in a training step, from sizes alone: what a layout costs before anybody implements it.

Collectives are counted as rings send them. Of n ranks, an all-reduce of B bytes sends 2 (n - 1) / n x B from each; a
reduce-scatter of B bytes, or an all-gather to B bytes, half of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from lavit_dist.config.model import LlamaConfig
from lavit_dist.models.llama import block_parameters
from lavit_dist.parallel.topology import Layout

GRADIENT_BYTES = 4
"""Gradients are accumulated and reduced in fp32."""
REUSE_DISTANCE = 10**9
"""Weights: DeepSpeed's `stage3_max_reuse_distance`, as it is unless set."""
LOSS_NUMBERS = 2
"""fp32 per token that tensor-parallel ranks tell each other: the logarithm of their sum of exponentials, and the label's logit."""


class Traffic(NamedTuple):
    """Bytes that one rank sends in an optimizer step, by axis of the layout."""

    tensor: float
    data: float
    pipe: float


@dataclass(frozen=True)
class Stage:
    """What one pipeline stage holds."""

    blocks: int
    """Decoder blocks."""
    is_first: bool
    """Whether it holds the embedding."""
    is_last: bool
    """Whether it holds the head and the loss."""


def stages_of(bounds: Sequence[int]) -> list[Stage]:
    """The stages between `bounds` [stage + 1] of the list of embedding, blocks and head (`lavit_dist.parallel.stages.partition`)."""
    head = bounds[-1] - 1
    return [Stage(min(stop, head) - max(start, 1), start == 0, stop > head) for start, stop in pairwise(bounds)]


@dataclass(frozen=True)
class StepSizes:
    """What a step's traffic depends on besides the layout."""

    model: LlamaConfig
    vocabulary_size: int
    """Rows of the embedding and of the head."""
    micro_batch_tokens: int
    """Slots of one forward pass: rows times their length."""
    micro_batches: int
    """Forward passes of one rank in a step."""
    element_bytes: int
    """Of activations and of the weights that are multiplied: 2 in bf16, 4 in fp32."""
    zero_stage: int

    @property
    def activation_bytes(self) -> int:
        """Of one micro-batch's residual stream."""
        return self.micro_batch_tokens * self.model.hidden_size * self.element_bytes


def least_traffic(sizes: StepSizes, layout: Layout, stage: Stage) -> Traffic:
    """What a rank on pipeline stage `stage` sends."""
    return Traffic(
        tensor=sizes.micro_batches * tensor_traffic(sizes, layout.tensor_size, stage),
        data=data_traffic(sizes, layout.data_size, rank_weights(sizes, layout.tensor_size, stage)),
        pipe=sizes.micro_batches * pipe_traffic(sizes, stage),
    )


def tensor_traffic(sizes: StepSizes, tensor_size: int, stage: Stage) -> float:
    """Of one micro-batch: all-reduces over tensor-parallel ranks, A = `activation_bytes` each but for the loss.

    A block has two parallel regions, attention and feed-forward; each is left by an all-reduce of its output, and of its
    input's gradient on the way back: 4 A. The embedding's look-up is shared out: A. So is the head, whose input's gradient is
    summed: A. For the loss each rank sends `LOSS_NUMBERS` fp32 per token to every other. Sequence parallelism makes of each all-reduce a
    reduce-scatter and an all-gather, of the same size together.
    """
    activations = (4 * stage.blocks + stage.is_first + stage.is_last) * sizes.activation_bytes
    loss = stage.is_last * (tensor_size - 1) * LOSS_NUMBERS * 4 * sizes.micro_batch_tokens
    return 2 * _ring(tensor_size) * activations + loss


def pipe_traffic(sizes: StepSizes, stage: Stage) -> float:
    """Of one micro-batch: the residual stream to the next stage, and its gradient to the one before, whole on each tensor-parallel rank."""
    return float(sizes.activation_bytes * ((not stage.is_last) + (not stage.is_first)))


def data_traffic(sizes: StepSizes, data_size: int, weights: int) -> float:
    """Of a step: the gradients, fp32, and the updated weights, over data-parallel ranks that hold `weights` each.

    Stage 0 all-reduces gradients. Stage 1 reduce-scatters them and gathers the updated weights: with both in fp32, as much.
    Stage 2 keeps no whole gradients, and so reduce-scatters those of every micro-batch. Stage 3 keeps no whole weights either, and
    instead of after the update gathers them in the forward pass of every micro-batch, and in its backward pass those again that
    DeepSpeed let go because more than `REUSE_DISTANCE` others were wanted in between.
    """
    gradients, gathered = GRADIENT_BYTES * weights, sizes.element_bytes * weights
    by_stage = {
        0: 2 * gradients,
        1: gradients + gathered,
        2: sizes.micro_batches * gradients + gathered,
        3: sizes.micro_batches * (gradients + gathered + sizes.element_bytes * max(0, weights - REUSE_DISTANCE // 2)),
    }
    return _ring(data_size) * by_stage[sizes.zero_stage]


def rank_weights(sizes: StepSizes, tensor_size: int, stage: Stage) -> int:
    """Numbers in the weights of one rank: its share of matrices, and every norm."""
    width = sizes.model.hidden_size
    norms = 2 * width * stage.blocks
    matrices = block_parameters(sizes.model) * stage.blocks - norms
    tables = sizes.vocabulary_size * width * (stage.is_first + stage.is_last)
    return (matrices + tables) // tensor_size + norms + width * stage.is_last


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks
