"""Writing LAION-style tars of pairs: `<key>.jpg`, `<key>.txt` (the first caption) and `<key>.json` (everything else)."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from lavit_dist.data.quarantine import Quarantined, write_quarantine
from lavit_dist.files import sync_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedPair:
    """A pair ready to be written. `suffix` is `jpg`, `png` or `webp`; `metadata` is what the .json holds beside `captions`."""

    key: str
    image: bytes
    suffix: str
    captions: tuple[str, ...]
    metadata: dict[str, Any]


class PairWriter:
    """Writes the shards of one split: `00000.tar` with `00000.quarantine.jsonl`, and so on. The same pairs give the same bytes.

    Each file appears whole or not at all. `close` writes the last shard.
    """

    def __init__(self, folder: Path, samples_per_shard: int) -> None:
        self.folder = folder
        self.samples_per_shard = samples_per_shard
        self.shards = self.samples = self.captions = 0
        self.reasons: Counter[str] = Counter()
        self._pairs: list[EncodedPair] = []
        self._quarantined: list[Quarantined] = []

    def add(self, outcome: EncodedPair | Quarantined) -> None:
        """Takes the next pair, or the record of one that can't be used; records go beside the shard that is being filled."""
        if isinstance(outcome, Quarantined):
            self._quarantined.append(outcome)
            self.reasons[outcome.reason] += 1
            return
        if len(self._pairs) == self.samples_per_shard:
            self._write()
        self._pairs.append(outcome)
        self.samples += 1
        self.captions += len(outcome.captions)

    def close(self) -> None:
        """Writes what is left. A split of which nothing was usable has a quarantine file and no tar."""
        if self._pairs or self._quarantined:
            self._write()

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.shards:05d}.tar"
        write_quarantine(path.with_suffix(".quarantine.jsonl"), self._quarantined)
        if self._pairs:
            write_shard(path, self._pairs)
            logger.info("%s: %d pairs, %d quarantined", path, len(self._pairs), len(self._quarantined))
        self.shards += 1
        self._pairs, self._quarantined = [], []


def write_shard(path: Path, pairs: Sequence[EncodedPair]) -> None:
    """Writes `pairs` to the tar `path`, whole or not at all; nothing in it depends on the time or the user."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        with TarWriter(file, encoder=False, mtime=0) as tar:
            for pair in pairs:
                metadata = pair.metadata | {"captions": list(pair.captions)}
                tar.write(
                    {
                        "__key__": pair.key,
                        pair.suffix: pair.image,
                        "txt": pair.captions[0].encode(),
                        "json": json.dumps(metadata).encode(),
                    }
                )
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)
