"""A local folder of fetched shards, shared by all processes of a host, which outlives them.

FOLDER/<sha256>.<size>.arrow            a shard, whole: it gets this name when its digest has been found right
FOLDER/.<sha256>.<size>.arrow.<n>.tmp   one that is being fetched, or that a killed process left
FOLDER/<sha256>.<size>.arrow.lock       held by the process that fetches it; it goes when that is done
FOLDER/.room.lock                       held while room is made

A shard is named by its content, so that runs and sets share what they have in common and none ever meets an older version. Whoever reads
one holds a shared lock on the file itself, which ends with its memory map, be it by a kill: what is locked is not removed.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lavit_dist.errors import UserError
from lavit_dist.files import replacing, sha256

logger = logging.getLogger(__name__)
WHOLE = re.compile(r"[0-9a-f]{64}\.\d+\.arrow")
UNFINISHED = re.compile(r"\.(?P<name>[0-9a-f]{64}\.(?P<size>\d+)\.arrow)\.\d+\.tmp")
LOCK = re.compile(r"(?P<name>[0-9a-f]{64}\.\d+\.arrow)\.lock")
"""The names that are ours to delete."""
Fetch = Callable[[Path], None]
"""Writes a shard to a path; it raises unless what it wrote has the right digest."""


class IdShardCache:
    """Shards by digest, at most `max_bytes` of them: the least recently used give way, those that a process reads never do."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Makes the folder, and removes what killed processes left in it. Raises `UserError` when it can't be written."""
        self.folder = folder
        self.max_bytes = max_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._room():
                self._make_room(0, "")
        except OSError as error:
            raise UserError(f"id_cache.folder {folder} can't be written ({error.strerror}); name a folder that can be.") from error

    def path(self, digest: str, size: int) -> Path:
        """Where the shard of this sha256 is, or would be."""
        return self.folder / f"{digest}.{size}.arrow"

    def open(self, digest: str, size: int, fetch: Fetch) -> mmap.mmap:
        """The shard, mapped, fetched if need be: once, however many processes and threads ask. It stays while the map is alive."""
        path = self.path(digest, size)
        while (content := _mapped(path, size)) is None:  # another process may need the room before this one reads
            self.ensure(digest, size, fetch)
        return content

    def ensure(self, digest: str, size: int, fetch: Fetch) -> None:
        """Fetches the shard unless it is there."""
        path = self.path(digest, size)
        if _is_whole(path, size):
            return
        with self._turn(path.name):
            if _is_whole(path, size):
                return
            with replacing(path) as temporary:
                with self._room():
                    self._make_room(size, path.name)
                    temporary.touch()  # its name now claims the room
                fetch(temporary)

    def drop_damaged(self, digest: str, size: int) -> bool:
        """Removes the shard if it is there and its digest is wrong; returns whether it was so."""
        path = self.path(digest, size)
        if not path.exists():
            return False
        with self._turn(path.name):
            if not path.exists() or (_is_whole(path, size) and sha256(path) == digest):
                return False
            path.unlink()
            return True

    @contextmanager
    def _turn(self, name: str) -> Iterator[None]:
        with FileLock(self.folder / f"{name}.lock") as lock:
            try:
                yield
            finally:
                Path(lock.lock_file).unlink(missing_ok=True)  # whoever waits for it notices, and makes it anew

    def _room(self) -> FileLock:
        return FileLock(self.folder / ".room.lock")

    def _make_room(self, size: int, mine: str) -> None:
        """Removes shards that nobody reads until `size` bytes more fit. The caller has the turn of the shard `mine`."""
        whole: list[tuple[float, int, Path]] = []
        taken = size
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                if WHOLE.fullmatch(path.name):
                    status = path.stat()
                    whole.append((status.st_mtime_ns, status.st_size, path))
                    taken += status.st_size
                elif match := UNFINISHED.fullmatch(path.name):
                    taken += 0 if self._remove_if_left(path, match["name"], mine) else int(match["size"])
                elif match := LOCK.fullmatch(path.name):
                    self._remove_if_left(path, match["name"], mine)
        for _, freed, path in sorted(whole):
            if taken <= self.max_bytes:
                return
            if _remove_unless_read(path):
                taken -= freed
        if taken > self.max_bytes:
            logger.warning(
                "id_cache.folder %s takes %d bytes for a while, more than id_cache.bytes %d, for processes read all that is in it",
                self.folder, taken, self.max_bytes,
            )  # fmt: skip

    def _remove_if_left(self, path: Path, name: str, mine: str) -> bool:
        """Removes what a killed process left of a fetch; returns False while one is at work."""
        if name == mine:  # no other process is at work on this one
            if not path.name.endswith(".lock"):
                path.unlink(missing_ok=True)
            return True
        lock = FileLock(self.folder / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):
            return False  # a process is at work, or it is another user's
        try:
            path.unlink(missing_ok=True)
            Path(lock.lock_file).unlink(missing_ok=True)
        finally:
            lock.release()
        return True


def _is_whole(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


def _mapped(path: Path, size: int) -> mmap.mmap | None:
    """The file as a map whose life its shared lock has; None when it isn't there whole."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH)
        status = os.fstat(file)
        if status.st_nlink == 0 or status.st_size != size:  # removed between the two calls, or truncated
            return None
        with suppress(PermissionError):
            os.utime(file)  # the most recently used now
        return mmap.mmap(file, size, access=mmap.ACCESS_READ)  # keeps a duplicate of `file`, and with it the lock
    finally:
        os.close(file)


def _remove_unless_read(path: Path) -> bool:
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except OSError:
        return False  # a process reads it, or it is another user's
    finally:
        os.close(file)
    return True
