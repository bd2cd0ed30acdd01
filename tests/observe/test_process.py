"""Programs under watch: their lines, their memory, and that nothing of them outlives an interruption."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from lavit_dist.observe.process import run_watched

ANCESTOR = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; held = bytearray(200 << 20); print('held', flush=True); time.sleep(%s)"])
print(child.pid, flush=True)
child.wait()
"""


def test_lines_go_to_the_screen_and_to_the_log_and_the_exit_code_comes_back(tmp_path: Path) -> None:
    shown: list[str] = []
    program = "import os, sys; os.write(1, b'out\\n'); os.write(2, b'bad byte \\xff\\n'); sys.exit(7)"
    log = tmp_path / "logs" / "stage.log"
    for _ in range(2):
        finished = run_watched([sys.executable, "-c", program], log, os.environ, shown.append)
        assert finished.returncode == 7
        assert 0 < finished.seconds < 30
    assert shown == ["out", "bad byte �"] * 2
    assert [line for line in log.read_text().splitlines() if not line.startswith("$ ")] == shown


def test_memory_of_descendants_counts(tmp_path: Path) -> None:
    finished = run_watched([sys.executable, "-c", ANCESTOR % 3], tmp_path / "log", os.environ, lambda _: None)
    assert finished.returncode == 0
    assert finished.peak_memory > 200 << 20


def test_an_interruption_ends_the_program_with_its_descendants(tmp_path: Path) -> None:
    pids: list[int] = []
    held: list[str] = []
    bystander = psutil.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    def show(line: str) -> None:
        if line == "held":
            held.append(line)
        else:
            pids.append(int(line))
        if held and pids:  # the two lines come from two processes, in either order
            os.kill(os.getpid(), signal.SIGINT)

    start = time.monotonic()
    # A shell that starts tests in the background has them ignore ctrl-C; this one must not.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_watched([sys.executable, "-c", ANCESTOR % 60], tmp_path / "log", os.environ, show)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert time.monotonic() - start < 30
    assert len(pids) == 1
    assert not psutil.pid_exists(pids[0]) or psutil.Process(pids[0]).status() == psutil.STATUS_ZOMBIE
    assert bystander.is_running()
    bystander.kill()
    bystander.wait()
