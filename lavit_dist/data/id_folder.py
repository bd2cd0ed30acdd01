"""The folder of an id set: on a local disk, or in a store that fsspec can reach."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lavit_dist.data.fetch import store
from lavit_dist.data.shard_list import MISSING, sizes_of
from lavit_dist.errors import UserError
from lavit_dist.files import write_atomically

WRITE_ATTEMPTS = 5
FIRST_WAIT = 1.0
"""Seconds before a file that a store didn't take is offered again; the next waits are each twice as long."""


@dataclass(frozen=True)
class IdFolder:
    """Reads and writes files of one folder. A local folder has no `system`."""

    name: Path | str
    """A local path, or the URL that was given: what messages call it."""
    path: str
    """What `system` calls it."""
    system: fsspec.AbstractFileSystem | None = None

    @classmethod
    def of(cls, location: str | Path, storage_options: Mapping[str, Any]) -> IdFolder:
        """The folder at a path or URL. Raises `UserError` for a URL of no known kind, or one whose package is missing."""
        if "://" not in str(location):
            return cls(Path(location), str(location))
        try:
            system, path = fsspec.core.url_to_fs(str(location).rstrip("/"), **storage_options)
        except ImportError as error:
            raise UserError(f"The id set {location} needs a package that is not installed: {error}.") from error
        except (ValueError, TypeError) as error:
            raise UserError(
                f"The id set {location} can't be reached ({error}); check the URL, and what storage_options gives the store."
            ) from error
        return cls(Path(path), path) if isinstance(system, LocalFileSystem) else cls(str(location).rstrip("/"), path, system)

    def read(self, name: str) -> bytes:
        """The content of a file. Raises `FileNotFoundError` when it isn't there, `UserError` when the store gives nothing."""
        if self.system is None:
            return (Path(self.path) / name).read_bytes()
        try:
            content: bytes = self.system.cat_file(self.file(name))
            return content
        except FileNotFoundError:
            raise
        except Exception as error:  # every store raises exceptions of its own
            raise UserError(
                f"{self.name}/{name} can't be read ({type(error).__name__}: {error}); check the URL, access and"
                " what storage_options gives the store."
            ) from error

    def write(self, name: str, content: bytes) -> None:
        """Replaces a file: readers see the old content or the new, never a part. Raises `OSError` and `StoreError`."""
        if self.system is None:
            write_atomically(Path(self.path) / name, content)
        else:
            store(self.system, content, self.file(name), attempts=WRITE_ATTEMPTS, first_wait=FIRST_WAIT)

    def remove(self, name: str) -> None:
        """Removes a file if it is there."""
        if self.system is None:
            (Path(self.path) / name).unlink(missing_ok=True)
        elif self.system.exists(self.file(name)):
            self.system.rm_file(self.file(name))

    def names(self) -> list[str]:
        """The names of what is in it, in order; none where the store allows no listing."""
        if self.system is None:
            return sorted(entry.name for entry in Path(self.path).iterdir())
        try:
            found = self.system.ls(self.path, detail=False)
        except Exception:  # a store may forbid listing and still hand out files
            return []
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)

    def file(self, name: str) -> str:
        """What `system` calls the file `name`."""
        return f"{self.path}/{name}"

    def sizes(self, names: Sequence[str]) -> dict[str, int | None]:
        """Bytes of each file, `MISSING` for what isn't there, None where the store doesn't say; by one listing where it allows it."""
        if self.system is None:
            if not Path(self.path).is_dir():
                return dict.fromkeys(names, MISSING)
            with os.scandir(self.path) as entries:
                found = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
            return {name: found.get(name, MISSING) for name in names}
        try:
            sizes = sizes_of(self.system, [self.file(name) for name in names])
        except Exception as error:
            raise UserError(f"{self.name} can't be listed ({type(error).__name__}: {error}); check access.") from error
        return {name: sizes[self.file(name)] for name in names}
