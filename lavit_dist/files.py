"""Files that are whole or absent, and their digests."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lavit_dist.errors import UserError

TEMPORARY = ".tmp"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
PASSING = (*DISK_FULL, errno.EROFS, errno.EIO, errno.ESTALE, errno.EAGAIN)
"""Errors of disks that may be over by the next start."""


def sha256(path: Path) -> str:
    """The hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def read_json(path: Path, remedy: str, keys: Iterable[str] = ()) -> dict[str, Any]:
    """The object in a JSON file of ours, which has `keys`. Raises `UserError`, ending in `remedy`, when the file holds anything else."""
    try:
        value = json.loads(path.read_text())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object; {remedy}.")
    missing = sorted(set(keys) - value.keys())
    if missing:
        raise UserError(f"{path} is damaged, or of another version: it lacks {', '.join(missing)}; {remedy}.")
    return value


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces `path` so that a reader or a crash sees the old content or the new, never a part."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to; what was written becomes `path` at the end of the block, whole and durable.

    A block that fails leaves `path` as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if is_disk_full(error) and error.filename is None:  # a write doesn't tell where
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def is_disk_full(error: BaseException) -> bool:
    """Whether there was no room for what should be written."""
    return isinstance(error, OSError) and error.errno in DISK_FULL


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes had begun to write into `folder` by `replacing`. Nobody may be writing there now."""
    for path in folder.glob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder beside `folder` to fill; it becomes `folder` at the end of the block, whole and durable.

    A block that fails leaves nothing, one that is killed .NAME.tmp, which the next one replaces. Raises `UserError` when there is
    something at `folder` already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already and is not an empty folder; name a new one, or remove it.")
    temporary = folder.absolute().with_name(f".{folder.absolute().name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync_tree(temporary)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(temporary.parent)


def sync_tree(folder: Path) -> None:
    """Makes every file beneath `folder`, and the names of all of them, durable."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
