"""Features on disk: records of one size in one file, found by an index that is written after them.

FOLDER/cache.json   the digest, type and shape of all records
FOLDER/features     records, one behind another
FOLDER/index        an entry per record: a hash of the key, the record's checksum, the entry's own

Processes take turns to write, under a lock, and read at any time. A process that is killed leaves a record without an entry, which the
next one writes over; what a power failure damages fails its checksum. Either way the features are made anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from lavit_dist.errors import UserError
from lavit_dist.files import read_json, write_atomically

logger = logging.getLogger(__name__)
ENTRY = struct.Struct("<16sII")
LOCK_SECONDS = 60.0
"""How long a process waits for its turn to write, before it goes on without."""


class FeatureStore:
    """A folder of features [patch, width] by key, of at most `budget` bytes."""

    def __init__(self, folder: Path, budget: int, *, digest: str, dtype: torch.dtype) -> None:
        """Raises `UserError` when the folder can't be written, or holds features of another digest or type."""
        self.folder = folder
        self.budget = budget
        self.dtype = dtype
        self._made_by = {"digest": digest, "dtype": str(dtype).removeprefix("torch.")}
        self._shape: tuple[int, ...] | None = None
        self._slots: dict[bytes, tuple[int, int]] = {}
        """Slot and checksum of each record, by the hash of its key."""
        self._entries = 0
        self._verified: set[int] = set()
        self._closed = False
        """Whether nothing more is written, because the disk is full."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._features, self._index = (os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666) for name in ("features", "index"))
        except OSError as error:
            raise UserError(f"The feature cache folder {folder} can't be written ({error.strerror}); name another.") from error
        self._lock = FileLock(folder / ".lock", thread_local=False)
        self._read_header()

    def __len__(self) -> int:
        """How many images' features are there."""
        self._refresh()
        return len(self._slots)

    def get(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """The features of those of `keys` that are there."""
        self._refresh()
        if self._shape is None:
            return {}
        found = {}
        for key in keys:
            slot = self._slots.get(_hash(key))
            features = None if slot is None else self._read(*slot)
            if features is not None:
                found[key] = features
            elif slot is not None:
                del self._slots[_hash(key)]
        return found

    @property
    def full(self) -> bool:
        """Whether nothing more will be stored."""
        return self._closed

    def put(self, features: Mapping[str, Tensor]) -> None:
        """Adds features, as many as there is room for; those that are there already stay."""
        if self._closed or not features:
            return
        try:
            with self._lock.acquire(timeout=LOCK_SECONDS):
                self._write_header(next(iter(features.values())))
                self._refresh()
                for key, value in features.items():
                    if _hash(key) not in self._slots and not self._append(_hash(key), value):
                        return
        except Timeout:
            logger.warning("another process has held %s for %.0f s; going on without storing", self.folder, LOCK_SECONDS)

    def _append(self, key: bytes, features: Tensor) -> bool:
        """Writes a record and then its entry; False when there is no room."""
        record = features.to(self.dtype).contiguous().view(torch.uint8).numpy().reshape(-1).data
        if (self._entries + 1) * (len(record) + ENTRY.size) > self.budget:
            self._closed = True
            return False
        entry = struct.pack("<16sI", key, zlib.crc32(record))
        entry += struct.pack("<I", zlib.crc32(entry))
        try:
            whole = os.pwrite(self._features, record, self._entries * len(record)) == len(record)
            whole = whole and os.pwrite(self._index, entry, self._entries * ENTRY.size) == len(entry)
        except OSError as error:
            logger.warning("%s can't be written (%s); no more features are stored", self.folder, error)
            whole = False
        self._closed = not whole
        if whole:
            self._slots[key] = (self._entries, zlib.crc32(record))
            self._verified.add(self._entries)
            self._entries += 1
        return whole

    def _refresh(self) -> None:
        """Takes up the entries that this and other processes have written since."""
        size = os.fstat(self._index).st_size - self._entries * ENTRY.size
        for entry in _whole_entries(os.pread(self._index, max(size, 0), self._entries * ENTRY.size)):
            key, checksum, own = ENTRY.unpack(entry)
            if zlib.crc32(entry[:-4]) == own:
                self._slots[key] = (self._entries, checksum)
            self._entries += 1
        if self._shape is None and self._slots:
            self._read_header()

    def _read(self, slot: int, checksum: int) -> Tensor | None:
        """The record in a slot; None when it is damaged."""
        assert self._shape is not None
        features = torch.empty(self._shape, dtype=self.dtype)
        record = features.view(torch.uint8).numpy().reshape(-1).data
        if os.preadv(self._features, [record], slot * len(record)) != len(record):
            return None
        if slot not in self._verified:
            if zlib.crc32(record) != checksum:
                return None
            self._verified.add(slot)
        return features

    def _read_header(self) -> None:
        path = self.folder / "cache.json"
        if not path.exists():
            return
        header: dict[str, Any] = read_json(path, "remove the folder")
        for name, wanted in self._made_by.items():
            if header.get(name) != wanted:
                raise UserError(
                    f"The feature cache {self.folder} was made with {name} {header.get(name)!r}, and now {name} is {wanted!r}: another"
                    " tower, precision or set of tars; remove that folder, or name another as feature_folder."
                )
        if "shape" not in header:
            raise UserError(f"{path} is damaged: it tells no shape; remove the folder {self.folder}.")
        self._shape = tuple(header["shape"])

    def _write_header(self, features: Tensor) -> None:
        if self._shape is None:
            self._read_header()
        if self._shape is None:
            header = self._made_by | {"shape": list(features.shape)}
            write_atomically(self.folder / "cache.json", json.dumps(header).encode())
            self._shape = tuple(features.shape)
        if tuple(features.shape) != self._shape:
            raise UserError(
                f"The feature cache {self.folder} holds features of shape {list(self._shape)}, and the tower makes {list(features.shape)};"
                " remove that folder, or name another."
            )


def _hash(key: str) -> bytes:
    return hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=16).digest()


def _whole_entries(data: bytes) -> Iterable[bytes]:
    return (data[start : start + ENTRY.size] for start in range(0, len(data) - ENTRY.size + 1, ENTRY.size))
