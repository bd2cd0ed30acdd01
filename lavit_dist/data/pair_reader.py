"""Opening tars of pairs wherever they lie, and decoding them piece by piece. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lavit_dist.data.fetch import fetch, size_flaw
from lavit_dist.data.hashing import stable_hash
from lavit_dist.data.id_shard import InputFile
from lavit_dist.data.pair_decoder import DecodedPairs, PairDecoder
from lavit_dist.data.quarantine import Quarantined
from lavit_dist.data.shard_list import Shard
from lavit_dist.data.tar_reader import RawSample, index_shard
from lavit_dist.files import sha256

FIRST_WAIT = 1.0
"""Seconds before a tar that couldn't be fetched is asked for again; the next waits are each twice as long."""


class InputChangedError(Exception):
    """A tar is no longer what it was when it was opened."""


@dataclass(frozen=True)
class OpenedTar:
    """A tar on this node's disk: what is in it, and what it looked like when its headers were read."""

    path: str
    fetched: bool
    """Whether the file was fetched and can be removed when it has been read."""
    state: tuple[int, int, int]
    """Size, time of change, inode."""
    input: InputFile
    samples: list[RawSample]
    refused: list[Quarantined]
    damage: Quarantined | None

    @property
    def place(self) -> tuple[str, tuple[int, int, int]]:
        """What `PairReader.decode` needs to know of it."""
        return self.path, self.state


class PairReader:
    """Opens tars and decodes their samples. It holds nothing between calls, so that any reader of the node can take any call."""

    def __init__(self, decoder: PairDecoder, attempts: int) -> None:
        """Tars of stores are asked for so many `attempts` times."""
        self.decoder, self.attempts = decoder, attempts

    def open(self, shard: Shard, folder: str) -> OpenedTar:
        """Fetches the tar to `folder` if need be, where it must be the only one of its name, hashes it and reads its headers.

        Raises `FetchError` and `OSError` when it can't be had, `InputChangedError` when it isn't as large as it was when it was listed.
        """
        path = Path(shard.path) if shard.file_system is None else self._fetch(shard, Path(folder))
        state = _state(path)
        if shard.size not in (None, state[0]):
            raise InputChangedError(f"{path} has {state[0]} bytes, but {shard.size} when this job was started; start it again")
        digest = sha256(path)
        index = index_shard(path)
        _check_unchanged(path, state)
        damage = dataclasses.replace(index.damage, key=shard.name) if index.damage else None
        source = InputFile(shard.name, state[0], digest)
        return OpenedTar(str(path), shard.file_system is not None, state, source, index.samples, index.refused, damage)

    def decode(self, place: tuple[str, tuple[int, int, int]], samples: Sequence[RawSample]) -> DecodedPairs:
        """Decodes some samples of an opened tar. Raises `InputChangedError` when it isn't what it was."""
        path, state = place
        try:
            decoded = self.decoder.decode(path, samples)
        finally:
            _check_unchanged(Path(path), state)
        return decoded

    def _fetch(self, shard: Shard, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        path = folder / f"{stable_hash(shard.path):016x}.tar"
        try:
            fetch(shard.file_system, shard.path, path, attempts=self.attempts, first_wait=FIRST_WAIT, flaw=size_flaw(shard.size))
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path


def _state(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _check_unchanged(path: Path, state: tuple[int, int, int]) -> None:
    if _state(path) != state:
        raise InputChangedError(f"{path} changed while it was read; if it is whole again, start this job again")
