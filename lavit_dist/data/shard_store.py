"""Opening tars: in place on a local disk, or fetched whole into a bounded folder first."""

from __future__ import annotations

import dataclasses
import os
import threading
import weakref
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from lavit_dist.data.fetch import FetchError, fetch, size_flaw
from lavit_dist.data.own_folder import OwnFolder
from lavit_dist.data.quarantine import Quarantined, SampleError
from lavit_dist.data.shard_list import MISSING, Shard
from lavit_dist.data.tar_reader import FileLocation, RawSample, ShardIndex, index_shard
from lavit_dist.errors import check


class OpenShard:
    """A tar that can be read, by several threads at a time. Its file stays open until nobody holds this value."""

    def __init__(self, name: str, path: Path) -> None:
        """Reads the headers. Raises `SampleError` when the file can't be opened."""
        self.name = name
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise SampleError("unreadable_tar", f"{type(error).__name__}: {error}") from error
        weakref.finalize(self, os.close, self._file)
        index = index_images(name, path)
        self.samples: list[RawSample] = index.samples
        self.quarantined: list[Quarantined] = index.quarantined

    def read(self, location: FileLocation) -> bytes:
        """The bytes at `location`; raises `SampleError` when they can't be had."""
        try:
            data = os.pread(self._file, location.size, location.offset)
        except OSError as error:
            raise SampleError("unreadable_tar", f"{type(error).__name__}: {error}") from error
        if len(data) != location.size:
            raise SampleError("truncated_tar", f"{self.name} ends within the {location.size} bytes at {location.offset}")
        return data


class ShardStore:
    """The tars of a list by number. Remote ones are fetched whole and kept, the least recently used giving way.

    The folder of fetched tars belongs to this process and is removed when it ends; what killed processes left is removed at the start.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        cache_folder: str | None,
        cache_bytes: int,
        attempts: int,
        open_at_a_time: int,
        first_wait: float = 1.0,
    ) -> None:
        """`open_at_a_time` is how many tars the caller reads, or prepares to read, together: the least that must fit.

        Between attempts to fetch a tar it waits `first_wait` seconds, then twice as long, and so on.
        """
        self.shards = shards
        self.cache_bytes = cache_bytes
        self.attempts = attempts
        self.first_wait = first_wait
        self._open: weakref.WeakValueDictionary[int, OpenShard] = weakref.WeakValueDictionary()
        self._turns: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.Lock()
        self._sizes: dict[int, int] = {}
        """Of fetched tars, the least recently used first."""
        remote = [shard.size or 0 for shard in shards if shard.file_system is not None]
        needed = sum(sorted(remote)[-open_at_a_time:])
        check(
            needed <= cache_bytes,
            f"images.cache_bytes {cache_bytes} can't hold the {open_at_a_time} tars that a rank has at hand at a time, up to {needed}"
            " bytes; raise it, or lower images.streams.",
        )
        self._own_folder = OwnFolder(cache_folder, "images.cache_folder") if remote else None
        self.folder = self._own_folder.path if self._own_folder else None

    def open(self, number: int) -> OpenShard:
        """Tar `number`, fetched if need be; callers that ask at the same time share it. Raises `SampleError` when it can't be had."""
        with self._lock:
            turn = self._turns[number]
        with turn:
            found = self._open.get(number)
            if found is None:
                shard = self.shards[number]
                if shard.size == MISSING:
                    raise SampleError("missing_tar", f"{shard.path} does not exist")
                path = Path(shard.path) if shard.file_system is None else self._fetched(number)
                found = self._open[number] = OpenShard(shard.name, path)
            return found

    def _fetched(self, number: int) -> Path:
        assert self.folder is not None
        path = self.folder / f"{number:08d}.tar"
        with self._lock:
            if number in self._sizes:
                self._sizes[number] = self._sizes.pop(number)  # the most recently used now
                return path
            self._make_room(self.shards[number].size or 0)
            self._sizes[number] = self.shards[number].size or 0
        try:
            self._fetch(self.shards[number], path)
        except SampleError:
            with self._lock:
                del self._sizes[number]
            path.unlink(missing_ok=True)
            raise
        with self._lock:
            self._sizes[number] = path.stat().st_size
        return path

    def _make_room(self, size: int) -> None:
        """Removes fetched tars that nobody reads until `size` bytes more fit; those being read stay whatever the budget."""
        assert self.folder is not None
        for number in list(self._sizes):
            if sum(self._sizes.values()) + size <= self.cache_bytes:
                return
            path = self.folder / f"{number:08d}.tar"
            if number not in self._open and path.exists() and not self._turns[number].locked():
                path.unlink()
                del self._sizes[number]

    def _fetch(self, shard: Shard, path: Path) -> None:
        assert shard.file_system is not None

        try:
            fetch(
                shard.file_system, shard.path, path, attempts=self.attempts, first_wait=self.first_wait, flaw=size_flaw(shard.size)
            )
        except FetchError as error:
            if error.missing:
                raise SampleError("missing_tar", f"{shard.path}: {error}") from error
            raise SampleError("unfetched_tar", f"{shard.path} {error}") from error


def index_images(name: str, path: Path) -> ShardIndex:
    """The images of the tar `name`, whose file is `path`; what can't be used is recorded under `name`, or `name/key`."""
    index = index_shard(path, needs_caption=False)
    named = [
        dataclasses.replace(record, key=name if record.key == path.name else f"{name}/{record.key}") for record in index.quarantined
    ]
    return ShardIndex(index.samples, named)
