"""Who is who among the ranks: one layout, asserted to be that of DeepSpeed's topology and of megatron-core's groups.

rank = (pipe_rank * data_size + data_rank) * tensor_size + tensor_rank
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.distributed as dist

from lavit_dist.config.pretrain import ParallelConfig
from lavit_dist.errors import check
from lavit_dist.models.vocabulary import Vocabulary
from lavit_dist.parallel.distributed import init_distributed
from lavit_dist.parallel.lean_imports import import_megatron


class Coordinates(NamedTuple):
    """A rank's place on each axis."""

    pipe: int
    data: int
    tensor: int


@dataclass(frozen=True)
class Layout:
    """Sizes of the three axes: tensor fastest, pipe outermost."""

    tensor_size: int
    pipe_size: int
    data_size: int

    @classmethod
    def of(cls, parallel: ParallelConfig, world_size: int) -> Layout:
        """The layout of `world_size` processes; raises `UserError` when they can't be shared out."""
        model_size = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        check(
            world_size % model_size == 0,
            f"The {world_size} processes that were started can't be shared out to parallel.tensor_parallel_size"
            f" {parallel.tensor_parallel_size} x parallel.pipeline_parallel_size {parallel.pipeline_parallel_size}: start a"
            f" multiple of {model_size} (deepspeed --num_gpus {model_size} ...), or change these sizes.",
        )
        return cls(parallel.tensor_parallel_size, parallel.pipeline_parallel_size, world_size // model_size)

    def check_batch(self, global_batch_size: int, micro_batch_size: int) -> None:
        """Raises `UserError` unless every data-parallel rank gets equally many whole micro-batches."""
        unit = micro_batch_size * self.data_size
        check(
            global_batch_size % unit == 0,
            f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} x {self.data_size}"
            f" data-parallel processes; choose {max(1, round(global_batch_size / unit)) * unit}, a multiple of {unit}, or another"
            " micro_batch_size.",
        )

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Raises `UserError` unless tensor-parallel ranks can hold equal shares of the rows of both tables."""
        for table in vocabulary.tables:
            check(
                table.padded_size % self.tensor_size == 0,
                f"The {table.size} {table.name} rows of the vocabulary, padded to {table.padded_size}, can't be shared out to"
                f" parallel.tensor_parallel_size {self.tensor_size} processes; choose a tensor_parallel_size that divides"
                f" {table.padded_size}, such as a power of two.",
            )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor_size * self.pipe_size * self.data_size

    def coordinates(self, rank: int) -> Coordinates:
        """The place of `rank`."""
        rest, tensor = divmod(rank, self.tensor_size)
        return Coordinates(*divmod(rest, self.data_size), tensor)

    def rank(self, place: Coordinates) -> int:
        """The rank at `place`."""
        return (place.pipe * self.data_size + place.data) * self.tensor_size + place.tensor

    def peers(self, rank: int, axis: str) -> list[int]:
        """The ranks that differ from `rank` on `axis` (tensor, data or pipe) alone, `rank` among them, in order."""
        here, size = self.coordinates(rank), getattr(self, f"{axis}_size")
        return [self.rank(here._replace(**{axis: place})) for place in range(size)]


def deepspeed_topology(layout: Layout) -> Any:
    """The layout as DeepSpeed's pipeline takes it."""
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    return PipeModelDataParallelTopology(num_pp=layout.pipe_size, num_mp=layout.tensor_size, num_dp=layout.data_size)


def start_model_parallel(layout: Layout, num_threads: int | None = None, timeout_seconds: float = 1800.0) -> None:
    """Joins the process group as `init_distributed` does, and makes megatron-core's groups; what names megatron is imported after this.

    megatron-core asks for `CUDA_DEVICE_MAX_CONNECTIONS=1`, so that communication starts before the computation that hides it; a GPU reads it
    when a process first uses it.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    init_distributed(num_threads, timeout_seconds)
    import_megatron()
    init_model_parallel(layout)


def init_model_parallel(layout: Layout) -> None:
    """Makes megatron-core's groups; every rank asserts that they and DeepSpeed's topology agree with `layout`. Collective."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_size,
        pipeline_model_parallel_size=layout.pipe_size,
        create_gloo_process_groups=False,
    )
    rank = dist.get_rank()
    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "data": parallel_state.get_data_parallel_group(),
        "pipe": parallel_state.get_pipeline_model_parallel_group(),
    }
    topology = deepspeed_topology(layout)
    for axis, group in groups.items():
        ours = layout.peers(rank, axis)
        theirs = dist.get_process_group_ranks(group)
        deepspeeds = next(
            ranks for ranks in topology.get_axis_comm_lists("model" if axis == "tensor" else axis) or [[rank]] if rank in ranks
        )
        if not ours == theirs == deepspeeds:
            raise AssertionError(f"rank {rank}, axis {axis}: layout {ours}, megatron-core {theirs}, DeepSpeed {deepspeeds}")


class ModelParallelUnit:
    """What DeepSpeed's plain engine asks of an `mpu`, answered by megatron-core; with one pipeline stage, model means tensor."""

    def __init__(self) -> None:
        from megatron.core import parallel_state

        self.get_model_parallel_rank = self.get_tensor_model_parallel_rank = parallel_state.get_tensor_model_parallel_rank
        self.get_model_parallel_world_size = parallel_state.get_tensor_model_parallel_world_size
        self.get_tensor_model_parallel_world_size = parallel_state.get_tensor_model_parallel_world_size
        self.get_model_parallel_group = self.get_tensor_model_parallel_group = parallel_state.get_tensor_model_parallel_group
        self.get_data_parallel_rank = parallel_state.get_data_parallel_rank
        self.get_data_parallel_world_size = parallel_state.get_data_parallel_world_size
        self.get_data_parallel_group = parallel_state.get_data_parallel_group
