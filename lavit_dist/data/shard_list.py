"""Which tars, or other files, there are: folders, patterns and URLs become one sorted list with sizes, and a fingerprint that tells when it
changes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from braceexpand import braceexpand
from fsspec.implementations.local import LocalFileSystem

from lavit_dist.data.hashing import stable_hash
from lavit_dist.data.pairs import list_shards
from lavit_dist.errors import UserError, check

FINGERPRINT_GROUPS = 1024
"""A fingerprint has at most this many parts, so that it stays small; up to so many tars it names the one that changed."""
LOOKUP_THREADS = 16
MISSING = -1
"""The size of a tar that isn't there."""


@dataclass(frozen=True)
class FileKind:
    """What files a setting names."""

    setting: str
    """Its full name, for messages."""
    noun: str
    """What one of them is called."""
    suffixes: tuple[str, ...]
    """How the names of those end that are taken out of a folder."""

    def takes(self, name: str) -> bool:
        """Whether a folder's file of this name is meant."""
        return name.endswith(self.suffixes)


TAR = "tar"


@dataclass(frozen=True)
class Shard:
    """A tar or other file. `path` is what `file_system` calls it; those on a local disk have no `file_system`."""

    name: str
    """Its path from the folder that all files of the list share: unlike all others, and the same on every machine."""
    path: str
    size: int | None
    """Bytes; `MISSING` when it isn't there, None when the store doesn't say."""
    file_system: fsspec.AbstractFileSystem | None = None


class Fingerprint:
    """Names and sizes of a list of tars as a few hashes, each over a run of consecutive tars."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._per_group = -(-len(shards) // FINGERPRINT_GROUPS)
        groups = (shards[start : start + self._per_group] for start in range(0, len(shards), self._per_group))
        self.hashes = [f"{stable_hash(*(f'{shard.name} {shard.size}' for shard in group)):016x}" for group in groups]

    def state(self) -> dict[str, Any]:
        """Plain values."""
        return {"shards": len(self._shards), "hashes": self.hashes}

    def check(self, state: Mapping[str, Any]) -> None:
        """Raises `UserError` that names the first tar, or run of tars, that isn't what it was when `state` was taken."""
        if state == self.state():
            return
        then: list[str] = state["hashes"]
        place = next(
            (i for i, (old, new) in enumerate(zip(then, self.hashes, strict=False)) if old != new), min(len(then), len(self.hashes))
        )
        group = self._shards[place * self._per_group :][: self._per_group]
        where = f"from {group[0].name} to {group[-1].name}" if len(group) > 1 else group[0].name if group else "at its end"
        found = f"{group[0].size} bytes" if len(group) == 1 else f"{len(group)} tars"
        raise UserError(
            f"The list of tars is not the one that the run was started with: it differs first {where} ({found}), and it had"
            f" {state['shards']} tars, where now there are {len(self._shards)}; put back what changed, or start a new run."
        )


def list_tars(sources: str | Sequence[str], storage_options: Mapping[str, Any], setting: str) -> list[Shard]:
    """All tars that `sources`, the value of `setting`, name, sorted by name: folders, patterns with * or {00..99}, URLs, lists of these.

    Raises what `list_files` does.
    """
    return list_files(sources, storage_options, FileKind(setting, TAR, (".tar",)))


def list_files(sources: str | Sequence[str], storage_options: Mapping[str, Any], kind: FileKind) -> list[Shard]:
    """All files that `sources`, the value of `kind.setting`, name, sorted by name.

    Raises `UserError` when a source can't be understood or names no file, when two name the same, and when none of the files exists.
    """
    found: list[Shard] = []
    for source in [sources] if isinstance(sources, str) else sources:
        found += _remote(source, storage_options, kind) if "://" in source else _local(source, kind)
    paths = sorted(shard.path for shard in found)
    doubled = next((path for path, following in itertools.pairwise(paths) if path == following), None)
    check(doubled is None, f"{kind.setting} names {doubled} twice; name each {kind.noun} once.")
    if all(shard.size == MISSING for shard in found):
        raise UserError(
            f"None of the {len(found)} {kind.noun}s that {kind.setting} names exists, such as {paths[0]}; check the names."
        )
    return sorted(_named(found), key=lambda shard: shard.name)


def _local(source: str, kind: FileKind) -> list[Shard]:
    path = Path(source).expanduser()
    if kind.noun == TAR and (path.is_dir() or not (path.suffix or any(sign in source for sign in "*?[{"))):
        paths = list_shards(path)  # which has a hint for who names a folder of splits
    elif path.is_dir():
        paths = sorted(file for file in path.iterdir() if kind.takes(file.name))
    else:
        paths = [match for pattern in _braces(source, kind, path.exists()) for match in _matches(Path(pattern).expanduser())]
    check(
        bool(paths),
        f"{kind.setting} {source} matches no file; name a folder of {kind.noun}s, a pattern such as DIR/*{kind.suffixes[0]}, or a URL.",
    )
    return [Shard("", str(path.absolute()), path.stat().st_size if path.is_file() else MISSING) for path in paths]


def _matches(pattern: Path) -> list[Path]:
    """The files of a pattern; a name without wildcards stands for itself, be the file there or not."""
    if not _is_pattern(str(pattern)):
        return [pattern]
    return sorted(path for path in Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))) if path.is_file())


def _remote(source: str, storage_options: Mapping[str, Any], kind: FileKind) -> list[Shard]:
    try:
        opened = [fsspec.core.url_to_fs(url, **storage_options) for url in _braces(source, kind)]
        system = opened[0][0]
        if isinstance(system, LocalFileSystem):
            return [shard for _, path in opened for shard in _local(path, kind)]
        paths = [path for _, path in opened]
        patterns = [path for path in paths if _is_pattern(path)]
        sizes: dict[str, int | None] = {}
        for pattern in patterns:
            sizes |= {path: info.get("size") for path, info in system.glob(pattern, detail=True).items() if info["type"] == "file"}
        names = [path for path in paths if not _is_pattern(path)]
        if len(names) == 1 and system.isdir(names[0]):
            folder = system.ls(names.pop(), detail=True)
            sizes |= {info["name"]: info.get("size") for info in folder if info["type"] == "file" and kind.takes(info["name"])}
        sizes |= sizes_of(system, names)
    except ImportError as error:
        raise UserError(f"{kind.setting} {source} needs a package that is not installed: {error}.") from error
    except UserError:
        raise
    except Exception as error:  # every store raises exceptions of its own
        raise UserError(
            f"{kind.setting} {source} can't be listed ({type(error).__name__}: {error}); check the URL and access."
        ) from error
    check(
        bool(sizes),
        f"{kind.setting} {source} matches no {kind.noun}; name a folder of {kind.noun}s or a pattern such as"
        f" s3://bucket/*{kind.suffixes[0]}.",
    )
    return [Shard("", path, size, system) for path, size in sizes.items()]


def sizes_of(system: fsspec.AbstractFileSystem, paths: Sequence[str]) -> dict[str, int | None]:
    """Sizes by path, `MISSING` for what isn't there: out of one listing per folder where the store allows it, else asked one by one."""
    listed: dict[str, int | None] = {}
    for folder in sorted({path.rpartition("/")[0] for path in paths}) if len(paths) > 1 else ():
        try:
            listed |= {info["name"]: info.get("size") for info in system.ls(folder, detail=True)}
        except (OSError, NotImplementedError):
            continue  # a store may forbid listing and still hand out files

    def size(path: str) -> int | None:
        try:
            known = listed.get(path)
            return system.info(path).get("size") if known is None else known
        except FileNotFoundError:
            return MISSING

    with ThreadPoolExecutor(LOOKUP_THREADS) as pool:
        return dict(zip(paths, pool.map(size, paths), strict=True))


def _braces(source: str, kind: FileKind, literal: bool = False) -> list[str]:
    try:
        return [source] if literal else list(braceexpand(source))
    except ValueError as error:
        raise UserError(
            f"{kind.setting} {source} can't be understood: {error}; write for example {{00000..00099}}{kind.suffixes[0]}."
        ) from error


def _is_pattern(path: str) -> bool:
    return any(character in path for character in "*?[")


def _named(shards: Iterable[Shard]) -> list[Shard]:
    shards = list(shards)
    parts = [PurePosixPath(shard.path).parts for shard in shards]
    levels = zip(*(part[:-1] for part in parts), strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda level: len(set(level)) == 1, levels))
    return [
        Shard("/".join(part[shared:]), shard.path, shard.size, shard.file_system) for shard, part in zip(shards, parts, strict=True)
    ]
