"""Weights and optimizer state of a model that was cut over ranks, in files that any other layout can read.

FOLDER/part-00000.safetensors    what rank 0 wrote: flat ranges of its tensor rank's shares of weights
FOLDER/index.json                which ranges of which share lie in which file

A weight is known by its place in the list of layers and megatron-core's name (`3.layer.mlp.linear_fc1.weight`), so pipeline stages leave no
trace; each number of it is in one file, whatever ZeRO stage wrote it. Nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lavit_dist.config.model import LlamaConfig
from lavit_dist.errors import UserError
from lavit_dist.files import read_json
from lavit_dist.parallel.llama_shards import cut_share, join_shares

INDEX = "index.json"
WEIGHT = "weight"
"""The kind of a weight itself, fp32 where there is a master; other kinds are its optimizer state."""


@dataclass(frozen=True)
class Part:
    """A flat range of a tensor rank's share of a weight, or of its optimizer state."""

    name: str
    kind: str
    """`WEIGHT`, or what the optimizer calls its state of it, such as `exp_avg`."""
    shape: tuple[int, ...]
    """Of the whole share."""
    tensor_rank: int
    start: int
    stop: int
    file: str

    @property
    def key(self) -> str:
        """Its name in the file."""
        return f"{self.name} {self.kind} {self.start}"


def index_of(tensor_size: int, parts: Iterable[Part]) -> dict[str, Any]:
    """What index.json says of all ranks' parts."""
    return {"tensor_size": tensor_size, "parts": [asdict(part) for part in parts]}


class WeightParts:
    """Reads such a folder, one weight at a time."""

    def __init__(self, folder: Path) -> None:
        """Raises `UserError` when it holds no index."""
        self._folder = folder
        if not (folder / INDEX).exists():
            raise UserError(f"{folder} holds no weights: {INDEX} is missing; give a complete step folder.")
        content = read_json(folder / INDEX, "give another step folder", ("tensor_size", "parts"))
        self.tensor_size = int(content["tensor_size"])
        self._parts: dict[tuple[str, str, int], list[Part]] = {}
        for values in content["parts"]:
            try:
                part = Part(**values | {"shape": tuple(values["shape"])})
            except (TypeError, KeyError) as error:
                raise UserError(
                    f"{folder / INDEX} is damaged, or of another version ({error}); give another step folder."
                ) from error
            if Path(part.file).name != part.file:
                raise UserError(
                    f"{folder / INDEX} names {part.file!r}, which is no plain file name, so it isn't trusted; give another step folder."
                )
            self._parts.setdefault((part.name, part.kind, part.tensor_rank), []).append(part)
        self._open: dict[str, Any] = {}

    @property
    def names(self) -> list[str]:
        """Of all weights."""
        return sorted({name for name, _, _ in self._parts})

    def count(self) -> int:
        """How many numbers all weights have, with the padding of tables."""
        shares = {(name, rank): parts[0].shape for (name, kind, rank), parts in self._parts.items() if kind == WEIGHT}
        return sum(torch.Size(shape).numel() for shape in shares.values())

    def has(self, name: str, kind: str) -> bool:
        """Whether there is such a thing of a weight; frozen ones have no optimizer state."""
        return (name, kind, 0) in self._parts

    def shares(self, name: str, kind: str = WEIGHT) -> list[Tensor]:
        """Every tensor rank's share; a single one of a weight that all hold alike. Raises `UserError` when a number is missing."""
        ranks = [rank for rank in range(self.tensor_size) if (name, kind, rank) in self._parts]
        return [self._share(name, kind, rank) for rank in ranks or [0]]

    def share(self, name: str, kind: str, model: LlamaConfig | None, rank: int, size: int) -> Tensor:
        """Rank `rank` of `size`'s share, whatever the layout that wrote it; `model` says how it is cut, and is None where nothing ever is."""
        if size == self.tensor_size and (name, kind, rank) in self._parts:
            return self._share(name, kind, rank)
        if model is None:
            raise UserError(f"{self._folder} lacks {name} ({kind}); give another step folder.")
        return cut_share(name, join_shares(name, self.shares(name, kind), model), rank, size)

    def _share(self, name: str, kind: str, rank: int) -> Tensor:
        parts = sorted(self._parts.get((name, kind, rank), []), key=lambda part: part.start)
        ends = [0, *(part.stop for part in parts)]
        whole = parts and [part.start for part in parts] == ends[:-1] and ends[-1] == torch.Size(parts[0].shape).numel()
        if not whole:
            raise UserError(f"{self._folder} lacks a part of {name} ({kind}) of tensor rank {rank}; give another step folder.")
        flat = [self._file(part.file).get_tensor(part.key) for part in parts]
        return (torch.cat(flat) if len(flat) > 1 else flat[0]).view(parts[0].shape)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self._folder / name
            if not path.exists():
                raise UserError(f"The checkpoint file {path} is missing; give a complete step folder.")
            self._open[name] = safe_open(path, framework="pt")
        return self._open[name]
