"""Reading LAION-style tars as they are found: damaged, cut short, with files missing or doubled.

Only headers are read here; a file's bytes are fetched by location when they are needed.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lavit_dist.data.quarantine import Quarantined, SampleError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
CAPTION_SUFFIXES = ("txt", "json")
STAGE = "index_shard"
LARGEST_FILE = 1 << 29
"""Bytes of a file that is read into memory: half a GiB, where the largest picture that is decoded by default has 0.27 GB of pixels."""


@dataclass(frozen=True)
class FileLocation:
    """Where a file's bytes lie: `size` bytes at `offset` in the tar `shard`."""

    shard: str
    offset: int
    size: int


@dataclass(frozen=True)
class RawSample:
    """The files that share a key, by lower-case suffix without the dot (`jpg`, `txt`, `json`)."""

    key: str
    files: dict[str, FileLocation]

    @property
    def image(self) -> FileLocation | None:
        """The picture, or None."""
        return next((self.files[suffix] for suffix in IMAGE_SUFFIXES if suffix in self.files), None)


@dataclass(frozen=True)
class ShardIndex:
    """What a tar holds: its usable samples in tar order, and a record for everything else."""

    samples: list[RawSample]
    refused: list[Quarantined]
    """Samples that can't be used."""
    damage: Quarantined | None = None
    """Why the tar couldn't be read to its end, under its own name."""

    @property
    def quarantined(self) -> list[Quarantined]:
        """All records."""
        return [*([self.damage] if self.damage else ()), *self.refused]


def index_shard(path: Path, *, needs_caption: bool = True) -> ShardIndex:
    """Groups the members of a tar by key. What is wrong with the tar becomes `Quarantined` records, never an exception:

    `unreadable_tar` (not a tar), `truncated_tar` (it ends early or is damaged; what lies before is used), `duplicate_member` (two files
    of one key and suffix: which belongs to which can't be known), `missing_image`, `missing_caption` (neither .txt nor .json, unless
    `needs_caption` is false), `odd_name` (a file whose name has no key or no suffix, or is not UTF-8), `large_file` (above `LARGEST_FILE`), `not_a_file` (a link, a
    device). Folders are passed over.
    """
    files: dict[str, dict[str, FileLocation]] = {}
    doubled: dict[str, str] = {}
    refused: list[Quarantined] = []
    damage = None
    try:
        size = path.stat().st_size if path.exists() else 0
        for member in _members(path):
            problem = _member_problem(member)
            if problem is not None:
                refused.append(Quarantined.of(member.name.encode(errors="backslashreplace").decode(), STAGE, problem))
                continue
            key, suffix = key_and_suffix(member.name) or ("", "")
            location = FileLocation(str(path), member.offset_data, member.size)
            if location.offset + location.size > size:
                files.setdefault(key, {})
            elif files.setdefault(key, {}).setdefault(suffix, location) != location:
                doubled[key] = suffix
    except SampleError as error:
        damage = Quarantined.of(path.name, STAGE, error)
    samples = []
    for key, found in files.items():
        sample = RawSample(key, found)
        problem = _problem(sample, doubled.get(key), needs_caption)
        if problem is None:
            samples.append(sample)
        else:
            refused.append(Quarantined.of(key, STAGE, problem))
    return ShardIndex(samples, refused, damage)


def read_bytes(location: FileLocation) -> bytes:
    """The bytes at `location`.

    Raises `SampleError` when the shard has become shorter since it was indexed (`truncated_tar`) or can't be read (`unreadable_tar`).
    """
    try:
        with Path(location.shard).open("rb") as file:
            return read_from(file, location)
    except OSError as error:
        raise SampleError("unreadable_tar", f"{location.shard}: {error.strerror}") from error


def read_from(file: BinaryIO, location: FileLocation) -> bytes:
    """`read_bytes` from the open file of the location's shard."""
    file.seek(location.offset)
    data = file.read(location.size)
    if len(data) != location.size:
        raise SampleError("truncated_tar", f"{location.shard} ends within the {location.size} bytes at {location.offset}")
    return data


def key_and_suffix(member_name: str) -> tuple[str, str] | None:
    """The key of a file in a tar and its lower-case suffix without the dot; None for a name that lacks either."""
    folder, name = os.path.split(member_name)
    stem, dot, suffix = name.partition(".")
    return (str(Path(folder) / stem), suffix.lower()) if stem and dot else None


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    """Everything but folders; raises `SampleError` where the tar can't be read further."""
    try:
        archive = tarfile.open(path, mode="r:")  # noqa: SIM115
    except (OSError, tarfile.TarError) as error:
        raise SampleError("unreadable_tar", f"{type(error).__name__}: {error}") from error
    with archive:
        while (member := _next(archive)) is not None:
            if not member.isdir():
                yield member
        _check_end(path, archive.offset)


def _member_problem(member: tarfile.TarInfo) -> SampleError | None:
    if not member.isreg():
        return SampleError("not_a_file", "a link or a device, which no pair can have")
    if key_and_suffix(member.name) is None:
        return SampleError("odd_name", "the name has no key, or no suffix that says what the file is")
    if not _is_text(member.name):
        return SampleError("odd_name", "the name is not UTF-8")
    if member.size > LARGEST_FILE:
        return SampleError("large_file", f"{member.size} bytes, more than {LARGEST_FILE}")
    return None


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # tarfile keeps other bytes as surrogates
        return False
    return True


def _next(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return archive.next()
    except (OSError, tarfile.TarError) as error:
        raise SampleError("truncated_tar", f"{type(error).__name__}: {error}") from error


def _check_end(path: Path, offset: int) -> None:
    """Python's tarfile takes a damaged header for the end of the archive; the real end is a block of zeros."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        found = "a damaged header" if len(block) == tarfile.BLOCKSIZE else "the end of the file"
        raise SampleError("truncated_tar", f"{found} at byte {offset} instead of the end-of-archive mark")


def _problem(sample: RawSample, doubled_suffix: str | None, needs_caption: bool) -> SampleError | None:
    found = ", ".join(sorted(sample.files)) or "no whole file"
    if doubled_suffix is not None:
        return SampleError("duplicate_member", f"more than one .{doubled_suffix} file")
    if sample.image is None:
        return SampleError("missing_image", f"none of {', '.join(IMAGE_SUFFIXES)} among: {found}")
    if needs_caption and not any(suffix in sample.files for suffix in CAPTION_SUFFIXES):
        return SampleError("missing_caption", f"neither .txt nor .json among: {found}")
    return None
