"""What one rank writes of a checkpoint, and its way to the disk: copied to host memory, written and hashed in one pass.

The tensors' files are safetensors files. The library's own writer isn't used, since it holds every number twice and Python's lock while it
writes, for which a training would stand still.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PIECE = 16 * 2**20
"""Bytes that are hashed and written at a time."""
SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Snapshot:
    """Files by their names in the step folder; the tensors may still be those that training goes on with."""

    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Tensors by name of each safetensors file."""
    objects: Mapping[str, Any] = field(default_factory=dict)
    """What each JSON file holds."""

    def __or__(self, other: Snapshot) -> Snapshot:
        return Snapshot({**self.tensors, **other.tensors}, {**self.objects, **other.objects})


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of a file."""

    bytes: int
    sha256: str


class HostCopies:
    """Copies of a snapshot's tensors in host memory, which is used again for the next one; pinned where tensors come from a GPU."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def take(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with tensors that nobody changes until the next call."""
        kept, self._kept = self._kept, {}
        copies: dict[str, dict[str, Tensor]] = {}
        on_gpu = False
        for file, tensors in snapshot.tensors.items():
            copies[file] = {}
            for key, tensor in tensors.items():
                if tensor.dtype not in SAFETENSORS_NAMES:
                    raise TypeError(f"{file} can't hold {key} as {tensor.dtype}")
                copy = kept.pop((file, key), None)
                if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                copies[file][key] = self._kept[file, key] = copy.copy_(tensor, non_blocking=True)
                on_gpu |= tensor.is_cuda
        if on_gpu:
            torch.cuda.synchronize()
        # What callers go on changing could be in the objects, too.
        return Snapshot(copies, {name: json.dumps(value) for name, value in snapshot.objects.items()})


def write_snapshot(folder: Path, snapshot: Snapshot) -> dict[str, FileRecord]:
    """Writes what `HostCopies.take` gave into `folder`, durably, and says what it wrote."""
    records = {}
    for name, tensors in snapshot.tensors.items():
        records[name] = _write_safetensors(folder / name, tensors)
    for name, text in snapshot.objects.items():
        with _Hashed(folder / name) as file:
            file.write(text.encode())
        records[name] = file.record
    return records


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    header: dict[str, Any] = {}
    end = 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[key] = {"dtype": SAFETENSORS_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    words = json.dumps(header, separators=(",", ":")).encode()
    words += b" " * (-len(words) % 8)  # numbers begin at multiples of 8 bytes
    with _Hashed(path) as file:
        file.write(len(words).to_bytes(8, "little"))
        file.write(words)
        for tensor in tensors.values():
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return file.record


class _Hashed:
    """A file that is hashed as it is written, and durable when it is closed."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._file = path, path.open("wb")
        self._digest, self._bytes = hashlib.sha256(), 0

    def __enter__(self) -> _Hashed:
        return self

    def write(self, content: bytes | memoryview) -> None:
        for start in range(0, len(content), PIECE):
            piece = content[start : start + PIECE]
            self._file.write(piece)
            self._digest.update(piece)
        self._bytes += len(content)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as error:  # a write doesn't tell where
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        finally:
            self._file.close()

    @property
    def record(self) -> FileRecord:
        return FileRecord(self._bytes, self._digest.hexdigest())
