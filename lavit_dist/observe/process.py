"""Running a program while it is watched: its lines as they come and in a log file, its time, the memory of all its processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from lavit_dist.config.base import secrets_hidden, words_without_secrets

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


class RelayedProcess:
    """A program in a session of its own, whose lines go to `show` as they come.

    A terminal's ctrl-C then reaches this process alone, which ends the program in order.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], show: Callable[[str], None]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._relay, args=(show,), daemon=True)
        self._reader.start()

    def wait(self, seconds: float) -> int | None:
        """Its exit code, negative for a signal; None if it still runs after `seconds`."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def drain(self) -> None:
        """After its end: waits until its last lines were shown, but not for ever, since what it has left behind may hold the pipe."""
        self._reader.join(GRACE)

    def end(self) -> None:
        """Ends it with all of its descendants, also those whose parent is gone."""
        end_tree(self.pid)
        self.end_orphans()
        self._process.wait()

    def end_orphans(self) -> None:
        """Kills what the program has left behind in its session."""
        killed = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid != self.pid and os.getsid(process.pid) == self.pid:
                    process.kill()
                    killed.append(process)
        psutil.wait_procs(killed, timeout=GRACE)

    def _relay(self, show: Callable[[str], None]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            # What can't be shown, for want of room or of a reader, is lost: the program must not wait for it on a full pipe.
            with contextlib.suppress(OSError, ValueError):
                show(line.rstrip("\n"))


def run_watched(command: Sequence[str], log: Path, environment: Mapping[str, str], show: Callable[[str], None]) -> Finished:
    """Runs `command`, gives every line that it writes to `show` and appends it to `log`.

    An exception here, such as KeyboardInterrupt, first ends the program with all of its descendants and nothing else.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with log.open("a", buffering=1) as file:
        file.write(f"$ {' '.join(words_without_secrets(command))}\n")

        mask = secrets_hidden(command)

        def log_and_show(line: str) -> None:
            file.write(mask(line) + "\n")
            show(mask(line))

        process = RelayedProcess(command, environment, log_and_show)
        peak = 0
        try:
            while True:
                peak = max(peak, sum(map(_memory, [psutil.Process(), *_tree(process.pid)])))
                code = process.wait(SAMPLE_EVERY)
                if code is not None:
                    break
            process.drain()
        except BaseException:
            process.end()
            raise
    return Finished(returncode=code, seconds=time.perf_counter() - start, peak_memory=peak)


def end_tree(pid: int) -> None:
    """Ends process `pid` and all its descendants: SIGTERM to each, SIGKILL to those that are left after `GRACE` seconds."""
    tree = _tree(pid)
    for process in tree:
        _quietly(process.terminate)
    _, alive = psutil.wait_procs(tree, timeout=GRACE)
    for process in alive:
        _quietly(process.kill)


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
