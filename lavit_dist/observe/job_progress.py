"""How far a long job of many shards is, in lines that a person can watch and in a file that programs can read."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from lavit_dist.data.id_folder import IdFolder
from lavit_dist.data.manifest import Manifest

logger = logging.getLogger(__name__)
PROGRESS = "progress.jsonl"
MOST_REASONS = 4


class JobProgress:
    """Tells what is done and how fast, at most once per `seconds_between` seconds, and keeps each report in FOLDER/progress.jsonl.

    A report there has `time` (Unix, seconds), `shards_done` and `shards` of the whole job, and of this start `seconds`, `images`,
    `images_per_second`, `images_per_second_now`, `actors`, `device_busy` (share of the last interval in which the actors' devices
    were computing) and `quarantined` by reason.
    """

    def __init__(self, folder: Path, *, shards: int, done: int, seconds_between: float) -> None:
        """`done` of the `shards` were there at the start."""
        self._file = folder / PROGRESS
        self.shards, self.done, self._done_before = shards, done, done
        self.seconds_between = seconds_between
        self._start = self._last = time.monotonic()
        self._last_images, self._last_device = 0, 0.0

    def tell(self, *, images: int, device_seconds: float, actors: int, quarantined: Mapping[str, int], last: bool = False) -> None:
        """Takes the sums over all actors since the start, and tells them if it is time to, or the `last` time."""
        now = time.monotonic()
        interval = now - self._last
        if interval < self.seconds_between and not last:
            return
        elapsed = max(now - self._start, 1e-9)
        finished = self.done - self._done_before
        left = elapsed / finished * (self.shards - self.done) if finished else None
        report = {
            "time": round(time.time(), 3),
            "seconds": round(elapsed, 3),
            "shards_done": self.done,
            "shards": self.shards,
            "images": images,
            "images_per_second": round(images / elapsed, 2),
            "images_per_second_now": round((images - self._last_images) / max(interval, 1e-9), 2),
            "actors": actors,
            # actors tell what they did every few seconds, so of a shorter interval they tell too much
            "device_busy": round(min(1.0, (device_seconds - self._last_device) / max(interval * max(actors, 1), 1e-9)), 3),
            "quarantined": dict(sorted(quarantined.items())),
        }
        self._last, self._last_images, self._last_device = now, images, device_seconds
        with self._file.open("a") as file:
            file.write(json.dumps(report) + "\n")
        logger.info(
            "shards %d/%d | images %s | images/s %.0f now, %.0f mean | actors %d | devices busy %.0f%% | quarantined %s | left %s",
            report["shards_done"],
            report["shards"],
            f"{images:,}",
            report["images_per_second_now"],
            report["images_per_second"],
            actors,
            100 * float(str(report["device_busy"])),
            _reasons(quarantined),
            "?" if left is None else timedelta(seconds=round(left)),
        )


def _reasons(counts: Mapping[str, int]) -> str:
    """The most frequent ones."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{reason} {count}" for reason, count in ordered[:MOST_REASONS]]
    rest = sum(count for _, count in ordered[MOST_REASONS:])
    return ", ".join([*shown, *([f"others {rest}"] if rest else [])]) or "none"


def read_throughput(manifest: Manifest, storage_options: Mapping[str, Any]) -> float | None:
    """Mean images per second of the job that made a set, over all its starts and splits; None where it left no report."""
    place = manifest.folder
    parent = place.rpartition("/")[0] if isinstance(place, str) else place.absolute().parent
    try:
        content = IdFolder.of(parent, storage_options).read(PROGRESS)
    except FileNotFoundError:
        return None
    images, seconds = 0, 0.0
    for of_start, took in _starts(content):
        images, seconds = images + of_start, seconds + took
    return images / seconds if seconds else None


def _starts(content: bytes) -> Iterator[tuple[int, float]]:
    """Images of each start of the job, and its seconds."""
    seconds, images = 0.0, 0
    for report in _reports(content):
        if report["seconds"] < seconds:  # it is another start's
            yield images, seconds
        seconds, images = report["seconds"], report["images"]
    yield images, seconds


def _reports(content: bytes) -> Iterator[dict[str, Any]]:
    """The reports that are whole; a job that was killed may leave half a line."""
    for line in content.splitlines():
        try:
            report = json.loads(line)
        except ValueError:
            continue
        if isinstance(report, dict) and {"seconds", "images"} <= report.keys():
            yield report
