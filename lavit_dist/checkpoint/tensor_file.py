"""Files of named tensors, torch's `.bin` and `.safetensors`: read a few tensors at a time, written whole or not at all.

Only tensors are ever read from a `.bin` (`weights_only`), never code.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lavit_dist.errors import UserError, check
from lavit_dist.files import replacing

BIN, SAFETENSORS = ".bin", ".safetensors"
GROUP_BYTES = 64 * 2**20
"""Bytes of a file that are mapped at a time. A page that was read counts as memory until its map is dropped."""
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Header(NamedTuple):
    """What a file says of a tensor without reading it."""

    dtype: torch.dtype | None
    """None for a type that isn't a floating-point one."""
    shape: tuple[int, ...]


class TensorFile:
    """The tensors of one file by name. Raises `UserError` naming the file when it holds anything else."""

    def __init__(self, path: Path, wrappers: Sequence[str] = ()) -> None:
        """`wrappers` are keys beneath which a `.bin` of other people may hold its tensors."""
        self.path = path
        self.wrappers = wrappers
        self.mappable = path.suffix == SAFETENSORS or zipfile.is_zipfile(path)
        """Whether a part can be read without the rest: files of before torch 1.6 are no archives and are loaded whole each time."""
        if path.suffix == SAFETENSORS:
            with self._open_safetensors() as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
                self.headers = {
                    key: Header(SAFETENSORS_DTYPES.get(of.get_dtype()), tuple(of.get_shape())) for key, of in slices.items()
                }
        else:
            self.headers = {
                key: Header(tensor.dtype if tensor.is_floating_point() else None, tuple(tensor.shape))
                for key, tensor in self._map_bin().items()
            }

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yields name and tensor, for the caller to copy at once: each is a view of the mapped file.

        The file is mapped anew every `GROUP_BYTES`, so that little of it is in memory at any time.
        """
        for group in self._groups(keys):
            if self.path.suffix == SAFETENSORS:
                with self._open_safetensors() as file:
                    for key in group:
                        yield key, file.get_tensor(key)
            else:
                tensors = self._map_bin()
                for key in group:
                    yield key, tensors[key]

    def read_rows(self, key: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows `first` to `last` (not included; to the end if None) of one tensor, copied: the file stays mapped no longer."""
        if self.path.suffix == SAFETENSORS:
            with self._open_safetensors() as file:
                return file.get_slice(key)[first:last].clone()  # a slice of whole rows is a view of the map
        return self._map_bin()[key][first:last].clone()

    def damaged(self) -> list[str]:
        """Parts of a `.bin`, by their names in the archive, that don't have the checksum that they were written with."""
        if self.path.suffix == SAFETENSORS or not self.mappable:
            return []
        with zipfile.ZipFile(self.path) as archive:
            name = archive.testzip()
        return [name] if name else []

    def check_intact(self) -> None:
        """Raises `UserError` for a file whose parts don't have their checksums; reads it whole."""
        damaged = self.damaged()
        check(not damaged, f"{self.path} is damaged: {', '.join(damaged)} doesn't have its checksum; restore the file.")

    def _groups(self, keys: Iterable[str]) -> Iterator[list[str]]:
        group: list[str] = []
        size = 0
        for key in keys:
            group.append(key)
            header = self.headers[key]
            size += torch.Size(header.shape).numel() * (header.dtype.itemsize if header.dtype else 1)
            if size >= GROUP_BYTES:
                yield group
                group, size = [], 0
        if group:
            yield group

    def _open_safetensors(self) -> Any:
        try:
            return safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path} is not a safetensors file ({_one_line(error)}); replace it.") from error

    def _map_bin(self) -> dict[str, Tensor]:
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self.mappable)
        except Exception as error:  # torch raises all kinds of exceptions on what isn't its own
            raise UserError(f"{self.path} is not a file of plain tensors ({type(error).__name__}); replace it.") from error
        for wrapper in self.wrappers:
            if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
                state = state[wrapper]
        if not isinstance(state, dict) or not all(isinstance(key, str) and isinstance(of, Tensor) for key, of in state.items()):
            raise UserError(f"{self.path} holds something else than tensors by name; replace it by a file of a state_dict.")
        return state


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Writes `tensors`, in `dtype` if it is given, to a `.bin` or `.safetensors` by the path's suffix; atomic."""
    state = {key: _own(tensor.detach().to("cpu", dtype)) for key, tensor in tensors.items()}
    for key, tensor in state.items():
        check(
            bool(tensor.isfinite().all()),
            f"{path} would hold numbers that are not finite in {key} as {tensor.dtype}; "
            + (
                "choose another dtype, such as bf16." if tensors[key].isfinite().all() else "they are so in the source; restore it."
            ),
        )
    with replacing(path) as temporary:
        if path.suffix == SAFETENSORS:
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file(state, temporary, metadata={"format": "pt"})
            temporary.chmod(mode)  # the library leaves a file that only its owner can read
        else:
            with temporary.open("wb") as file:
                torch.save(state, file)


def _own(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of it where it is a part of a larger storage, all of which would be written."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.contiguous().clone()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
