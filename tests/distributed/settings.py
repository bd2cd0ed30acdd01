"""The settings under which the same model is trained on the same documents: all legal ones of a number of ranks, and a selection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

PACKED, ONE_PER_ROW, ONE_SIDED = "packed", "one document per row", "one-sided supervision"
CHECKPOINTING = ("none", "selective", "full")


@dataclass(frozen=True)
class Setting:
    """One run. Its name says all that differs from one process."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    zero: int = 1
    sequence_parallel: bool = False
    gather_twice: bool = False
    checkpointing: str = "none"
    precision: str = "fp32"
    rows: str = PACKED
    offload: str = ""
    compiled: bool = False
    resumes: bool = False
    """Whether the run also saves, goes back, and exports."""

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def layout(self) -> tuple[int, int, int]:
        return self.tensor, self.pipeline, self.data

    @property
    def name(self) -> str:
        extras = [self.precision if self.precision != "fp32" else "", self.rows if self.rows != PACKED else ""]
        extras += ["sequence parallel" if self.sequence_parallel else "", "gather twice" if self.gather_twice else ""]
        extras += [f"offload {self.offload}" if self.offload else ""]
        extras += [
            f"{self.checkpointing} recomputation" if self.checkpointing != "none" else "",
            "compiled" if self.compiled else "",
        ]
        sizes = f"tensor {self.tensor} pipeline {self.pipeline} data {self.data} ZeRO-{self.zero}"
        return " ".join([sizes, *filter(None, extras)])

    @property
    def changes(self) -> dict[str, Any]:
        """What it changes in the configuration."""
        return {
            "precision": self.precision,
            "compile": self.compiled,
            "activation_checkpointing": {"mode": self.checkpointing},
            "parallel": {
                "tensor_parallel_size": self.tensor,
                "pipeline_parallel_size": self.pipeline,
                "zero_stage": self.zero,
                "sequence_parallel": self.sequence_parallel,
                "gather_twice": self.gather_twice,
                "offload_optimizer": bool(self.offload),
                "offload_parameters": self.offload == "parameters",
            },
        }


def matrix(world_size: int) -> list[Setting]:
    """Every legal setting of `world_size` ranks, those of one layout after each other."""
    return [setting for layout in _layouts(world_size) for setting in _of_layout(*layout)]


def _layouts(world_size: int) -> list[tuple[int, int, int]]:
    sizes = [size for size in (1, 2, 4) if world_size % size == 0]
    return [
        (tensor, pipeline, world_size // (tensor * pipeline))
        for tensor in sizes
        for pipeline in sizes
        if world_size % (tensor * pipeline) == 0
    ]


def _of_layout(tensor: int, pipeline: int, data: int) -> Iterator[Setting]:
    stages = (0, 1) if pipeline > 1 else (0, 1, 2, 3)
    for zero in stages:
        for sequence_parallel in (False, True) if tensor > 1 else (False,):
            here = {"tensor": tensor, "pipeline": pipeline, "data": data, "zero": zero, "sequence_parallel": sequence_parallel}
            yield from (Setting(**here, checkpointing=mode) for mode in CHECKPOINTING)
            if zero > 0:
                yield Setting(**here, precision="bf16", checkpointing="full" if sequence_parallel else "none")
            if zero == 1:
                yield Setting(**here, rows=ONE_PER_ROW)
                yield Setting(**here, rows=ONE_SIDED)
                if sequence_parallel:
                    yield Setting(**here, gather_twice=True)
                if pipeline * data == 1 and tensor < 4:  # what is compiled doesn't depend on the others
                    yield Setting(**here, compiled=True)
        if zero > 0 and pipeline == 1:
            yield Setting(tensor=tensor, data=data, zero=zero, offload="optimizer")
    if pipeline == 1:
        yield Setting(tensor=tensor, data=data, zero=3, offload="parameters")


ONE_PROCESS = Setting(resumes=True)
ONE_SIDED_PROCESS = Setting(rows=ONE_SIDED)
OF_EIGHT = Setting(tensor=2, pipeline=2, data=2, sequence_parallel=True, checkpointing="full")
SELECTION = [
    ONE_PROCESS,
    ONE_SIDED_PROCESS,
    Setting(zero=0, checkpointing="selective"),
    Setting(zero=3, offload="parameters"),
    Setting(compiled=True),
    Setting(tensor=2, zero=0, resumes=True),
    Setting(tensor=2, zero=3, sequence_parallel=True, checkpointing="selective", resumes=True),
    Setting(pipeline=2, zero=0, checkpointing="full", resumes=True),
    Setting(pipeline=2, precision="bf16", resumes=True),
    Setting(data=2, zero=2, rows=ONE_PER_ROW, resumes=True),
    Setting(data=2, rows=ONE_SIDED),
    Setting(data=2, zero=2, offload="optimizer"),
    Setting(tensor=2, pipeline=2, sequence_parallel=True, checkpointing="full", resumes=True),
    Setting(tensor=2, data=2, zero=3, resumes=True),
    Setting(data=2, precision="bf16"),
    Setting(pipeline=2, data=2, precision="bf16"),
    Setting(tensor=2, data=2, zero=2, sequence_parallel=True, checkpointing="full", precision="bf16"),
    Setting(tensor=2, sequence_parallel=True, gather_twice=True),
]
"""What the tests cover without --all-layouts: every value of every setting, and the engines that the settings meet in."""


def settings_of(world_size: int, everything: bool) -> list[Setting]:
    """The settings of `world_size` ranks that are run."""
    if not everything:
        return [setting for setting in SELECTION if setting.world_size == world_size]
    if world_size == OF_EIGHT.world_size:
        return [OF_EIGHT]
    selected = {setting.name: setting for setting in SELECTION}
    return [selected.get(setting.name, setting) for setting in matrix(world_size)]
