"""How long a training step should take on many GPUs: computation, collectives and the pipeline's bubble, from sizes alone.

Nothing overlaps here: DeepSpeed switches overlapping off with pipelines, and its messages block. The result is what a layout costs at
worst, given the machine's rates; where a run is slower, its kernels or its network don't reach them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lavit_dist.models.llama import block_parameters
from lavit_dist.parallel.communication_cost import GRADIENT_BYTES, Stage, StepSizes, Traffic, least_traffic, rank_weights
from lavit_dist.parallel.topology import Layout

OPTIMIZER_BYTES = 12
"""Per weight: fp32 master weight and AdamW's two moments."""
ADAMW_TRAFFIC = 30
"""Bytes of memory that an update reads and writes per weight: gradient, master weight and moments once each way, bf16 weight."""
SHARED_ACTIVATIONS, REPLICATED_ACTIVATIONS = 24, 10
"""Bytes per token, channel and block that the backward pass needs, in bf16 without recomputation: inside the parallel regions, and at
their borders (Korthikanti et al., arXiv 2205.05198, equation 2, without attention scores and dropout)."""


@dataclass(frozen=True)
class Machine:
    """Rates of one GPU and its links."""

    peak_flops: float
    """FLOP/s of dense products in bf16."""
    efficiency: float
    """Share of the peak that one GPU reaches by itself."""
    memory_bytes: float
    """Capacity of one GPU."""
    memory_bandwidth: float
    """Bytes/s of its memory."""
    node_size: int
    """GPUs that NVLink joins."""
    node_bandwidth: float
    """Bytes/s that a GPU sends to another of its node."""
    network_bandwidth: float
    """Bytes/s that a GPU sends to other nodes."""
    node_latency: float
    """Seconds per message within a node."""
    network_latency: float
    """Seconds per message between nodes."""

    def seconds(self, sent: float, messages: float, reach: int) -> float:
        """To send `sent` bytes in `messages` messages among ranks that span `reach` consecutive GPUs."""
        inside = reach <= self.node_size
        bandwidth = self.node_bandwidth if inside else self.network_bandwidth
        return sent / bandwidth + messages * (self.node_latency if inside else self.network_latency)


class StepTime(NamedTuple):
    """Seconds of an optimizer step, which they add up to."""

    compute: float
    """Of the slowest stage, over all micro-batches."""
    tensor: float
    pipe: float
    bubble: float
    """Of the slowest stage: waiting for the pipeline to fill and to drain."""
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(self)


class StageMemory(NamedTuple):
    """Bytes that a rank of one pipeline stage holds."""

    state: float
    """Weights, fp32 gradients and optimizer state."""
    activations: float
    """Of the micro-batches in flight."""
    head: float
    """fp32 gradients of the head's rows, which the loss makes in the forward pass and keeps for the backward pass."""
    reduced: float
    """ZeRO-1's part of the summed gradients, before it takes their place (`lavit_dist.engine.gradient_reduction`)."""

    @property
    def working(self) -> float:
        """All but the state."""
        return self.activations + self.head + self.reduced


def step_time(sizes: StepSizes, layout: Layout, stages: Sequence[Stage], machine: Machine, mean_context: float) -> StepTime:
    """A step of a layout whose pipeline stages are `stages`; a token attends to `mean_context` positions.

    With c the slowest stage's seconds per micro-batch, messages included, M micro-batches and P stages, a step takes (M + P - 1) c,
    then reduces gradients and updates weights.
    """
    per_stage = [_stage_seconds(sizes, layout, stage, machine, mean_context) for stage in stages]
    slowest = max(per_stage, key=sum)
    compute, tensor, pipe = (sizes.micro_batches * seconds for seconds in slowest)
    data_reach = layout.tensor_size * layout.data_size
    weights = max(rank_weights(sizes, layout.tensor_size, stage) for stage in stages)
    data = max(least_traffic(sizes, layout, stage).data for stage in stages)
    return StepTime(
        compute=compute,
        tensor=tensor,
        pipe=pipe,
        bubble=(layout.pipe_size - 1) * sum(slowest),
        data=machine.seconds(data, 2 * (layout.data_size - 1), data_reach),
        optimizer=ADAMW_TRAFFIC * weights / _shared_over(sizes, layout) / machine.memory_bandwidth,
    )


def memory_bytes(sizes: StepSizes, layout: Layout, stages: Sequence[Stage]) -> float:
    """Peak memory of the fullest rank."""
    return max(stage.state + stage.working for stage in stage_memory(sizes, layout, stages))


def stage_memory(sizes: StepSizes, layout: Layout, stages: Sequence[Stage]) -> list[StageMemory]:
    """Bytes on a rank of each stage. Stage p of P holds activations of P - p micro-batches. Gradients are whole up to stage 1 of ZeRO.

    Activations and the reduced part are counted together, although they don't live at once: what an allocator keeps of the former, in
    pieces, isn't the one piece that the latter needs. Communication buffers and the loss's logits aren't counted.
    """
    model, tensor, data = sizes.model, layout.tensor_size, layout.data_size
    per_block = sizes.micro_batch_tokens * model.hidden_size * (REPLICATED_ACTIVATIONS + SHARED_ACTIVATIONS / tensor)
    found = []
    for number, stage in enumerate(stages):
        weights = rank_weights(sizes, tensor, stage)
        per_weight = (
            sizes.element_bytes / (data if sizes.zero_stage == 3 else 1)
            + GRADIENT_BYTES / (data if sizes.zero_stage >= 2 else 1)
            + OPTIMIZER_BYTES / _shared_over(sizes, layout)
        )
        in_flight = min(len(stages) - number, sizes.micro_batches)
        head = stage.is_last * GRADIENT_BYTES * sizes.vocabulary_size * model.hidden_size / tensor
        reduced = GRADIENT_BYTES * weights / data if sizes.zero_stage == 1 and data > 1 else 0.0
        found.append(StageMemory(weights * per_weight, in_flight * stage.blocks * per_block, head, reduced))
    return found


def stage_flops(sizes: StepSizes, stage: Stage, mean_context: float) -> float:
    """Floating-point operations of forward and backward of one micro-batch on a whole stage, as in `training_flops`."""
    model = sizes.model
    attention = 12 * model.num_attention_heads * model.head_width * mean_context
    per_token = (
        stage.blocks * (6 * block_parameters(model) + attention) + stage.is_last * 6 * sizes.vocabulary_size * model.hidden_size
    )
    return float(per_token * sizes.micro_batch_tokens)


def _stage_seconds(
    sizes: StepSizes, layout: Layout, stage: Stage, machine: Machine, mean_context: float
) -> tuple[float, float, float]:
    """Of one micro-batch: computation, tensor-parallel collectives, messages to neighbours."""
    traffic = Traffic(*(sent / sizes.micro_batches for sent in least_traffic(sizes, layout, stage)))
    compute = stage_flops(sizes, stage, mean_context) / layout.tensor_size / machine.peak_flops / machine.efficiency
    all_reduces = 4 * stage.blocks + stage.is_first + 2 * stage.is_last
    tensor = machine.seconds(traffic.tensor, all_reduces * 2 * (layout.tensor_size - 1), layout.tensor_size)
    # neighbouring stages are tensor x data ranks apart
    pipe_reach = layout.world_size if layout.pipe_size > 1 else 1
    pipe = machine.seconds(traffic.pipe, (not stage.is_first) + (not stage.is_last), pipe_reach)
    return compute, tensor, pipe


def _shared_over(sizes: StepSizes, layout: Layout) -> int:
    """Data-parallel ranks that share out the optimizer state."""
    return layout.data_size if sizes.zero_stage >= 1 else 1
