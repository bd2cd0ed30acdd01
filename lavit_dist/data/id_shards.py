"""The shards of an id set by number, from wherever they lie: opened when they are asked for, by memory map, a bounded number at a time."""

from __future__ import annotations

import io
import itertools
import logging
import mmap
import os
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from lavit_dist.config.id_cache import IdCacheConfig
from lavit_dist.data.fetch import FetchError, fetch
from lavit_dist.data.id_folder import IdFolder
from lavit_dist.data.id_shard import IdShard, IdShardHead, ShardRecord, is_intact
from lavit_dist.data.id_shard_cache import IdShardCache
from lavit_dist.data.manifest import MANIFEST, Manifest
from lavit_dist.data.shard_flaw import shard_flaw
from lavit_dist.data.shard_list import MISSING
from lavit_dist.errors import UserError, check
from lavit_dist.files import sha256

logger = logging.getLogger(__name__)
MAX_OPEN = 256
"""Shards that a process has open at most. Each takes a file descriptor and a map, of which it often may have 1,024 and 65,530."""
NAMED = 5
"""Shards that a message names."""
DEFAULT_FOLDER = Path("~/.cache/lavit_dist/ids")


class IdShards:
    """`shards[i]` is shard i of the manifest. Threads may share it."""

    def __init__(
        self, manifest: Manifest, cache: IdCacheConfig | None = None, *, max_open: int = MAX_OPEN, first_wait: float = 1.0
    ) -> None:
        """Opens no shard. Raises `UserError` for a cache that is too small or can't be written; local sets make none.

        Between attempts to fetch a shard it waits `first_wait` seconds, then twice as long, and so on.
        """
        cache = cache or IdCacheConfig()
        self.manifest = manifest
        self.max_open = max_open
        folder = IdFolder.of(manifest.folder, cache.storage_options)
        self._place = _Local(folder) if folder.system is None else _Remote(folder, cache, first_wait, manifest)
        self._folder = folder
        self._open: OrderedDict[int, IdShard] = OrderedDict()
        """The least recently used first."""
        self._lock = threading.Lock()
        self._turns: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)
        self._wanted: deque[int] = deque()
        self._worker: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self.manifest.shards)

    def __getitem__(self, index: int) -> IdShard:
        """Raises `UserError`, naming the shard, when it can't be had or is damaged."""
        if (shard := self._held(index)) is not None:
            return shard
        index = range(len(self))[index]
        with self._lock:
            turn = self._turns[index]
        with turn:
            shard = self._held(index)
            if shard is None:
                record = self.manifest.shards[index]
                self._close_for(record.size)
                shard = self._place.open(record)
                with self._lock:
                    self._open[index] = shard
        return shard

    def __iter__(self) -> Iterator[IdShard]:
        return (self[index] for index in range(len(self)))

    @property
    def head_threads(self) -> int | None:
        """How many heads to read at a time: many of a store, which answers slowly; None where it is a matter of computing."""
        return self._place.head_threads

    def head(self, index: int) -> IdShardHead:
        """What packing needs to know of a shard: it is not left open, and of a remote one only these columns are read."""
        return self._place.head(self.manifest.shards[index])

    def prefetch(self, indices: Sequence[int]) -> None:
        """Starts to fetch these shards, or to read them from disk, in this order: those that will be asked for next.

        Another call replaces what was not begun. As many are taken as there is room for beside those that are open.
        """
        sizes = itertools.accumulate(self.manifest.shards[index].size for index in indices)
        fitting = [index for index, size in zip(indices, sizes, strict=True) if size <= self._place.ahead_bytes]
        with self._lock:
            self._wanted = deque(fitting)
            if fitting and (self._worker is None or not self._worker.is_alive()):
                self._worker = threading.Thread(target=self._work, name="id shards", daemon=True)
                self._worker.start()

    def check_sizes(self) -> None:
        """Raises `UserError` that names the shards which are missing or have another size, by one listing of the folder."""
        missing, wrong = self._listed()
        remedy = f"put them back, or run {self.manifest.program} again, which redoes such shards alone."
        check(
            not missing,
            f"The id set {self.manifest.folder} lacks {len(missing)} of its {len(self)} shards: {_some(list(missing))}; {remedy}",
        )
        named = [f"{name} ({flaw})" for name, flaw in wrong.items()]
        check(
            not wrong,
            f"In the id set {self.manifest.folder} {len(wrong)} of {len(self)} shards are damaged: {_some(named)}; {remedy}",
        )

    def check_digests(self) -> None:
        """Reads every local shard and raises `UserError` naming the first whose sha256 is wrong.

        Remote ones are checked whenever they are fetched; here those in the cache are, and fetched again later if damaged.
        """
        for record in self.manifest.shards:
            self._place.check(record)

    def flaws(self) -> dict[str, str]:
        """Reads every shard where it lies, whatever the cache holds; returns what `shard_flaw` finds wrong, by the shard's name."""
        missing, wrong = self._listed()
        found = missing | wrong
        for record in self.manifest.shards:
            if record.name not in found and (flaw := self._place.flaw(record)) is not None:
                found[record.name] = flaw
        return dict(sorted(found.items()))

    def _listed(self) -> tuple[dict[str, str], dict[str, str]]:
        """The shards that a listing of the folder lacks, and those that it has with another size; what is wrong by name."""
        found = self._folder.sizes([record.name for record in self.manifest.shards])
        missing = {name: "is missing" for name, size in found.items() if size == MISSING}
        wrong = {
            record.name: f"{found[record.name]} bytes, {MANIFEST} says {record.size}"
            for record in self.manifest.shards
            if found[record.name] not in (None, MISSING, record.size)
        }
        return missing, wrong

    def _held(self, index: int) -> IdShard | None:
        with self._lock:
            shard = self._open.get(index)
            if shard is not None:
                self._open.move_to_end(index)
            return shard

    def _close_for(self, size: int) -> None:
        """Lets go of the least recently used shards until one more of `size` bytes may be opened. Arrays in use stay valid."""
        with self._lock:
            held = sum(self.manifest.shards[index].size for index in self._open)
            while self._open and (len(self._open) >= self.max_open or held + size > self._place.open_bytes):
                held -= self.manifest.shards[self._open.popitem(last=False)[0]].size

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._worker = None
                    return
                index = self._wanted.popleft()
            if self._held(index) is None:
                try:
                    self._place.prepare(self.manifest.shards[index])
                except (UserError, OSError) as error:  # whoever needs the shard tries again, and says so
                    logger.warning("a shard could not be prefetched: %s", error)


class _Local:
    """Shards on a local disk, read in place."""

    head_threads = None
    open_bytes = ahead_bytes = 1 << 40
    """Maps take no memory that can't be had back, so their number is what bounds them."""

    def __init__(self, folder: IdFolder) -> None:
        self._folder = Path(folder.path)

    def open(self, record: ShardRecord) -> IdShard:
        return IdShard(self._folder / record.name)

    def prepare(self, record: ShardRecord) -> None:
        file = os.open(self._folder / record.name, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(file)

    def head(self, record: ShardRecord) -> IdShardHead:
        return self.open(record)

    def flaw(self, record: ShardRecord) -> str | None:
        return shard_flaw(self._folder / record.name, record)

    def check(self, record: ShardRecord) -> None:
        path = self._folder / record.name
        check(
            is_intact(path, record),
            f"The id shard {path} is damaged (its sha256 differs from {MANIFEST}); put it back, or run what made the set again,"
            " which redoes such shards alone.",
        )


class _Remote:
    """Shards in a store, read from the cache. Half of the cache is for those that a process has open, half for those that come next."""

    head_threads = 16

    def __init__(self, folder: IdFolder, cache: IdCacheConfig, first_wait: float, manifest: Manifest) -> None:
        largest = max(record.size for record in manifest.shards)
        check(
            2 * largest <= cache.bytes,
            f"id_cache.bytes {cache.bytes} can't hold two shards of {folder.name}, the largest of which has {largest} bytes; raise it to"
            f" {2 * largest} or more.",
        )
        self.open_bytes = self.ahead_bytes = cache.bytes // 2
        self._folder, self._attempts, self._first_wait = folder, cache.attempts, first_wait
        self._whole = threading.Lock()
        self._cache = IdShardCache(Path(cache.folder or DEFAULT_FOLDER).expanduser(), cache.bytes)

    def open(self, record: ShardRecord) -> IdShard:
        return IdShard(self._cache.path(record.sha256, record.size), self._content(record))

    def prepare(self, record: ShardRecord) -> None:
        self._cache.ensure(record.sha256, record.size, lambda target: self._fetch(record, target))

    def flaw(self, record: ShardRecord) -> str | None:
        with TemporaryDirectory() as folder:
            path = Path(folder) / record.name
            try:
                self._get(record, path)
            except FetchError as error:
                return str(error)
            return shard_flaw(path, record)

    def check(self, record: ShardRecord) -> None:
        if self._cache.drop_damaged(record.sha256, record.size):
            logger.warning("the copy of %s in the cache was damaged and is fetched again", record.name)

    def head(self, record: ShardRecord) -> IdShardHead:
        assert self._folder.system is not None
        name = f"{self._folder.name}/{record.name}"
        try:
            with self._folder.system.open(self._folder.file(record.name), "rb") as file:
                return IdShardHead.read(file, name)
        except Exception as error:  # every store raises exceptions of its own
            logger.info("the head of %s can't be read alone (%s: %s); it is fetched whole", name, type(error).__name__, error)
        with self._whole, self._content(record) as content:  # one at a time, and copied: no more than the cache has room for
            return IdShardHead.read(io.BytesIO(content), name)

    def _content(self, record: ShardRecord) -> mmap.mmap:
        return self._cache.open(record.sha256, record.size, lambda target: self._fetch(record, target))

    def _fetch(self, record: ShardRecord, target: Path) -> None:
        try:
            self._get(record, target)
        except FetchError as error:
            raise UserError(
                f"The id shard {self._folder.name}/{record.name} can't be fetched: {error}; put it back, or wait until the store answers,"
                " and start the run again: it goes on from its newest checkpoint."
            ) from error

    def _get(self, record: ShardRecord, target: Path) -> None:
        assert self._folder.system is not None

        def flaw(fetched: Path) -> str | None:
            size = fetched.stat().st_size
            if size != record.size:
                return f"{size} bytes came, {record.size} were expected"
            return None if sha256(fetched) == record.sha256 else f"the sha256 of what came differs from {MANIFEST}"

        source = self._folder.file(record.name)
        fetch(self._folder.system, source, target, attempts=self._attempts, first_wait=self._first_wait, flaw=flaw)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
