"""Files from and to a store: tried again with growing waits, and looked at before they count as there."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import fsspec

from lavit_dist.files import is_disk_full

logger = logging.getLogger(__name__)


class FetchError(Exception):
    """A file that can't be had; the message says why, without the file's name."""

    def __init__(self, message: str, missing: bool) -> None:
        """`missing` when the store says that it isn't there, or not for us: trying again would not help."""
        super().__init__(message, missing)  # as it is built anew in another process
        self.message, self.missing = message, missing

    def __str__(self) -> str:
        return self.message


def fetch(
    system: fsspec.AbstractFileSystem,
    source: str,
    target: Path,
    *,
    attempts: int,
    first_wait: float,
    flaw: Callable[[Path], str | None],
) -> None:
    """Copies `source` of `system` to the local file `target`, until `flaw(target)` names nothing that is wrong with it.

    It waits `first_wait` seconds before the second attempt, then twice as long, and so on. Raises `FetchError`, what came then lies in
    `target`, and `OSError` for a full disk.
    """
    for attempt in range(attempts):
        if attempt:
            time.sleep(first_wait * 2 ** (attempt - 1))
        try:
            system.get_file(source, str(target))
            found = flaw(target)
            if found is None:
                return
            error: Exception = OSError(found)
        except (FileNotFoundError, PermissionError) as refusal:
            raise FetchError(f"{type(refusal).__name__}: {refusal}", True) from refusal
        except Exception as failure:  # every store raises exceptions of its own
            if is_disk_full(failure):
                raise
            error = failure
        logger.warning("fetching %s failed (%s: %s)", source, type(error).__name__, error)
    raise FetchError(f"after {attempts} attempts: {type(error).__name__}: {error}", False)


def size_flaw(expected: int | None) -> Callable[[Path], str | None]:
    """A `flaw` for `fetch`: another size than the one that the store tells, if it does."""

    def flaw(fetched: Path) -> str | None:
        size = fetched.stat().st_size
        return None if expected in (None, size) else f"{size} bytes came, {expected} were expected"

    return flaw


class StoreError(Exception):
    """A file that a store doesn't take; the message says which and why."""


def store(system: fsspec.AbstractFileSystem, content: bytes | Path, target: str, *, attempts: int, first_wait: float) -> None:
    """Makes `content`, or what is in that local file, the file `target` of `system`, with waits as those of `fetch`. Raises `StoreError`."""
    length = content.stat().st_size if isinstance(content, Path) else len(content)
    for attempt in range(attempts):
        if attempt:
            time.sleep(first_wait * 2 ** (attempt - 1))
        try:
            if isinstance(content, Path):
                system.put_file(str(content), target)
            else:
                system.pipe_file(target, content)
            system.invalidate_cache(target.rpartition("/")[0])
            size = system.info(target)["size"]
            if size == length:
                return
            error: Exception = OSError(f"{size} bytes arrived of {length}")
        except PermissionError as refusal:
            raise StoreError(f"{target} can't be written: {refusal}") from refusal
        except Exception as failure:  # every store raises exceptions of its own
            error = failure
        logger.warning("writing %s failed (%s: %s)", target, type(error).__name__, error)
    raise StoreError(f"{target} can't be written after {attempts} attempts: {type(error).__name__}: {error}")
