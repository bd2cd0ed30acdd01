"""Runs that hang: who is named, and that the process ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lavit_dist.engine.events import HUNG
from lavit_dist.engine.watchdog import HANGS, HEARTBEATS, verdict


def sign(alive: int, step: int = 11, where: str = "torch/all_reduce", **more: Any) -> dict[str, Any]:
    return {"alive": alive, "step": step, "doing": "training", "where": where, "host": "h1", **more}


def signs(*of_ranks: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return dict(enumerate(of_ranks))


ALIVE = (sign(5), sign(6))


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (signs(sign(4), sign(9)), signs(sign(5), sign(9, host="h2")), "rank 1 on h2 gives no sign of life"),
        (signs(sign(4), sign(9)), signs(sign(5), sign(10, 9)), "rank 1 on h1 is still in step 10, training, at torch/all_reduce"),
        (
            signs(*(sign(1) for _ in range(3))),
            signs(sign(2), sign(2, where="data/fetch.py:88 read"), sign(2)),
            "rank 1 on h1 is training, at data/fetch.py:88 read, while most wait at torch/all_reduce",
        ),
        (signs(sign(1), sign(1)), signs(sign(2), sign(2)), "all ranks live, and wait at torch/all_reduce"),
    ],
)
def test_who_hangs_is_named(before: dict[int, Any], after: dict[int, Any], said: str) -> None:
    assert verdict(before, after, 11).startswith(said)


PROGRAM = """
import sys, time
from pathlib import Path
from lavit_dist.engine.watchdog import Watchdog
from lavit_dist.observe.logs import setup_logging

def stuck():
    time.sleep(60)

setup_logging()
with Watchdog(Path(sys.argv[1]), 1.0) as watchdog:
    for step in range(4):
        watchdog.beat(step, "training")
        time.sleep(0.5)  # in all longer than what is a hang
    if sys.argv[2] == "hangs":
        stuck()
print("the end")
"""


def test_a_process_that_hangs_ends_and_leaves_what_it_was_doing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    well = subprocess.run([*command, "goes on"], capture_output=True, text=True, timeout=60, check=False)
    assert (well.returncode, well.stdout) == (0, "the end\n")
    hung = subprocess.run([*command, "hangs"], capture_output=True, text=True, timeout=60, check=False)
    assert hung.returncode == HUNG
    assert "Nothing has moved for 1 s (faults.hang_seconds) in step 4, training" in hung.stderr
    assert "in stuck" in (tmp_path / HANGS / "step-00000003/rank-00000.txt").read_text()
    assert (tmp_path / HEARTBEATS / "rank-00000.json").exists()
    assert '"event": "hung"' in (tmp_path / "events.jsonl").read_text()
