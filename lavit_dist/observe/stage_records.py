"""What each stage of a chain of programs took, kept beside its results."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lavit_dist.files import read_json, write_atomically

STAGES_FILE = "stages.json"


@dataclass(frozen=True)
class StageRecord:
    """One stage, over all its attempts."""

    title: str
    """What it makes, in words."""
    command: str
    """How it is run alone."""
    seconds: float = 0.0
    """Wall time of all attempts together."""
    peak_memory: int = 0
    """Largest memory of all of its processes together, bytes."""

    def after(self, seconds: float, peak_memory: int) -> StageRecord:
        """The record with one more attempt."""
        return dataclasses.replace(self, seconds=self.seconds + seconds, peak_memory=max(self.peak_memory, peak_memory))


def read_stage_records(folder: Path) -> dict[str, StageRecord]:
    """The records in `folder` by stage name, in the order in which they first ran; none when there is no file."""
    path = folder / STAGES_FILE
    if not path.exists():
        return {}
    return {name: StageRecord(**record) for name, record in read_json(path, "remove it; it holds the stages' times alone").items()}


def write_stage_records(folder: Path, records: Mapping[str, StageRecord]) -> None:
    """Replaces the records in `folder`."""
    content = {name: dataclasses.asdict(record) for name, record in records.items()}
    write_atomically(folder / STAGES_FILE, json.dumps(content, indent=1).encode())


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds, such as 3:07."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def gigabytes(count: int) -> str:
    """Bytes in units of 10^9."""
    return f"{count / 1e9:.1f} GB"
