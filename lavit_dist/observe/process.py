"""Running a program while it is watched: its lines as they come and in a log file, its time, the memory of all its processes."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

GRACE = 10.0
"""Seconds that a process has to end after SIGTERM before it is killed."""
SAMPLE_EVERY = 1.0
"""Seconds between two looks at the memory; a look costs a few milliseconds."""


@dataclass(frozen=True)
class Finished:
    """How a program ended."""

    returncode: int
    """Its exit code; negative for the signal that ended it."""
    seconds: float
    """Its wall time."""
    peak_memory: int
    """Largest memory of it, its descendants and this process together, bytes; shared pages count once."""


def run_watched(command: Sequence[str], log: Path, environment: Mapping[str, str], show: Callable[[str], None]) -> Finished:
    """Runs `command`, gives every line that it writes to `show` and appends it to `log`.

    An exception here, such as KeyboardInterrupt, first ends the program with all of its descendants and nothing else.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n")
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            text=True,
            errors="replace",
            start_new_session=True,  # so that a terminal's ctrl-C reaches this process alone, which then ends the program in order
        )
        assert process.stdout is not None
        reader = threading.Thread(target=_relay, args=(process.stdout, file, show), daemon=True)
        reader.start()
        try:
            peak = _wait(process)
            reader.join(GRACE)  # a descendant that outlives the program may still hold the pipe
        except BaseException:
            end_tree(process.pid)
            process.wait()
            raise
    return Finished(returncode=process.returncode, seconds=time.perf_counter() - start, peak_memory=peak)


def end_tree(pid: int) -> None:
    """Ends process `pid` and all its descendants: SIGTERM to each, SIGKILL to those that are left after `GRACE` seconds."""
    tree = _tree(pid)
    for process in tree:
        _quietly(process.terminate)
    _, alive = psutil.wait_procs(tree, timeout=GRACE)
    for process in alive:
        _quietly(process.kill)


def _relay(lines: IO[str], file: IO[str], show: Callable[[str], None]) -> None:
    for line in lines:
        file.write(line)
        file.flush()
        show(line.rstrip("\n"))


def _wait(process: subprocess.Popen[str]) -> int:
    """Waits for the end; returns the peak memory."""
    peak = 0
    while True:
        peak = max(peak, sum(map(_memory, [psutil.Process(), *_tree(process.pid)])))
        try:
            process.wait(SAMPLE_EVERY)
        except subprocess.TimeoutExpired:
            continue
        return peak


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _memory(process: psutil.Process) -> int:
    """The memory of one process, a page shared by n processes counting 1/n where the system can tell (Linux)."""
    try:
        info = process.memory_full_info()
    except psutil.Error:
        return 0
    return int(getattr(info, "pss", info.rss))


def _quietly(act: Callable[[], None]) -> None:
    try:
        act()
    except psutil.NoSuchProcess:
        return
