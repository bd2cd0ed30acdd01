"""A folder for files that a process fetches for itself; what killed processes left is removed by the next one."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path

from filelock import FileLock, Timeout

from lavit_dist.errors import UserError

PREFIX = "lavit_dist-shards-"


class OwnFolder:
    """A new folder that lasts until it is closed, nobody holds this value any more, or the process ends."""

    def __init__(self, parent: str | None, setting: str) -> None:
        """Makes it beneath `parent`, or the system's folder of temporary files; those there of processes that have ended are removed.

        Raises `UserError`, naming the `setting` that `parent` comes from, when it can't be written.
        """
        root = Path(tempfile.gettempdir() if parent is None else parent)
        try:
            root.mkdir(parents=True, exist_ok=True)
            for lock_path in root.glob(f"{PREFIX}*.lock"):
                _remove_if_left(lock_path)
            handle, name = tempfile.mkstemp(prefix=PREFIX, suffix=".lock", dir=root)
            os.close(handle)
            lock = FileLock(name, thread_local=False)
            lock.acquire()
            self.path = Path(name).with_suffix("")
            self.path.mkdir()
        except OSError as error:
            raise UserError(f"{setting} {root} can't be written ({error.strerror}); name a folder that can be.") from error
        self.close = weakref.finalize(self, _remove, self.path, lock)


def _remove_if_left(lock_path: Path) -> None:
    lock = FileLock(lock_path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return  # a process is at work in it, or it is another user's
    _remove(lock_path.with_suffix(""), lock)


def _remove(folder: Path, lock: FileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()
