"""How many rows each block of an epoch is packed into: found once from lengths alone, then kept in a file that the plan's digest names."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from lavit_dist.files import write_atomically

logger = logging.getLogger(__name__)
DEFAULT_FOLDER = Path("~/.cache/lavit_dist/plans")


@dataclass(frozen=True)
class EpochPlan:
    """One epoch of one set of documents."""

    rows: NDArray[np.int64]
    """[block]: rows that the documents of each block are packed into."""
    lengths: NDArray[np.int64]
    """[length]: documents of so many tokens with their captions."""
    usable: NDArray[np.int64]
    """[length]: those of them that can be in an epoch."""

    @property
    def num_rows(self) -> int:
        return int(self.rows.sum())

    @classmethod
    def read(cls, path: Path) -> EpochPlan | None:
        """The plan in `path`; None when there is none, or it is damaged, which is logged."""
        try:
            content, digest = path.read_bytes().rsplit(b"\n", 1)
            if hashlib.sha256(content).hexdigest().encode() != digest:
                raise ValueError("its digest is another")
            values = json.loads(content)
            return cls(*(np.array(values[field.name], np.int64) for field in dataclasses.fields(cls)))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, OSError) as error:
            logger.warning("the packing plan %s is damaged (%s) and is made again", path, error)
            return None

    def write(self, path: Path) -> None:
        """Replaces `path`; its last line is the sha256 of what is before it."""
        content = json.dumps({name: column.tolist() for name, column in vars(self).items()}).encode()
        write_atomically(path, content + b"\n" + hashlib.sha256(content).hexdigest().encode())


def planned(path: Path | None, num_blocks: int, pack_block: Callable[[int], EpochPlan], threads: int | None = None) -> EpochPlan:
    """The plan of an epoch, read from `path` or made of `pack_block`'s, block by block on `threads` (None: one per core), and then kept there.

    Of processes that ask for one `path`, one makes the plan and the others wait for it. Without `path` nothing is read or kept. A plan
    that can't be kept is made all the same, with a warning.
    """
    if path is None:
        return _made(num_blocks, pack_block, threads)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            kept = EpochPlan.read(path)
            if kept is None:
                kept = _made(num_blocks, pack_block, threads)
                kept.write(path)
            return kept
    except OSError as error:
        logger.warning(
            "the packing plan can't be kept in %s (%s), so that every start makes it again; set plan_cache to a folder that can be written",
            path.parent, error.strerror or error,
        )  # fmt: skip
        return _made(num_blocks, pack_block, threads)


def _made(num_blocks: int, pack_block: Callable[[int], EpochPlan], threads: int | None) -> EpochPlan:
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        return _joined(list(pool.map(pack_block, range(num_blocks))))


def _joined(parts: list[EpochPlan]) -> EpochPlan:
    rows = np.concatenate([part.rows for part in parts])
    return EpochPlan(rows, _sum([part.lengths for part in parts]), _sum([part.usable for part in parts]))


def _sum(histograms: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    total = np.zeros(max(map(len, histograms)), np.int64)
    for histogram in histograms:
        total[: len(histogram)] += histogram
    return total
