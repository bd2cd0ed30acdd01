"""A run that hangs is ended, and what each rank was doing is written down, so that it can be started again.

RUN_DIR/heartbeats/rank-00003.json     step, what is being done, where in the program, and a number that grows while the process lives
RUN_DIR/hangs/step-00000012/           per rank that could tell: where all of its threads were, and with nccl torch's record of its last collectives

A rank that was stopped, or whose host is gone, can't tell anything: the others see that its number has ceased to grow. No clocks are compared.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil
import torch
import torch.distributed as dist

from lavit_dist.engine.events import HUNG, record_event
from lavit_dist.files import write_atomically
from lavit_dist.parallel.distributed import rank, world_size

logger = logging.getLogger(__name__)
HEARTBEATS, HANGS = "heartbeats", "hangs"
LONGEST_INTERVAL = 15.0
"""Seconds between two signs of life at most; a shared file system sees one small file per rank and interval."""
LONGEST_BARK = 20.0
"""Seconds beyond its waits that writing down what hangs may take: the disk may be what hangs."""
CLOCK_STEPS = 5.0
"""Seconds by which two readings of when a process was started may differ, as the clock was set meanwhile."""
PACKAGES = Path(__file__).parents[2]


class Watchdog:
    """Ends the process when nothing was said to `beat` for `seconds`. Within its block a thread watches."""

    def __init__(self, run_dir: Path, seconds: float) -> None:
        self.run_dir, self.seconds = run_dir, seconds
        self.interval = min(LONGEST_INTERVAL, seconds / 4)
        self.file = run_dir / HEARTBEATS / f"rank-{rank():05d}.json"
        self._step, self._doing, self._since, self._alive = 0, "starting", time.monotonic(), 0
        self._main = threading.get_ident()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._since = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()

    def beat(self, step: int, doing: str) -> None:
        """The main thread has got to step `step` and is now `doing`."""
        self._step, self._doing, self._since = step, doing, time.monotonic()

    def _watch(self) -> None:
        while not self._end.wait(self.interval):
            self._sign()
            if time.monotonic() - self._since > self.seconds:
                self._bark()

    def _sign(self) -> None:
        """Writes this rank's sign of life; a disk that is full or away doesn't matter."""
        self._alive += 1
        frame = sys._current_frames().get(self._main)
        sign = {
            "alive": self._alive,
            "step": self._step,
            "doing": self._doing,
            "where": _where(frame),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
        }
        try:
            write_atomically(self.file, json.dumps(sign).encode())
        except OSError as error:
            logger.warning("no sign of life could be written: %s", error)

    def _bark(self) -> None:
        """Says who hangs, writes down what is known, and ends the process, whatever of it fails or hangs, too."""
        step, doing = self._step, self._doing
        threading.Timer(LONGEST_BARK + 2 * self.interval, os._exit, [HUNG]).start()
        folder = self.run_dir / HANGS / f"step-{step:08d}"
        with contextlib.suppress(Exception):
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"rank-{rank():05d}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            _dump_flight_recorder(folder / f"rank-{rank():05d}.collectives.json")
        with contextlib.suppress(Exception):
            before = _signs(self.run_dir)
            self._end.wait(self.interval / 2)  # all ranks hung in the same moment, but for the difference of their beats
            self._sign()
            self._end.wait(1.5 * self.interval)
            self._sign()
            after = _signs(self.run_dir)
            said = verdict(before, after, step)
            for of in silent(before, after):
                _kill(after[of])
            told = f"Nothing has moved for {self.seconds:.0f} s (faults.hang_seconds) in step {step + 1}, {doing}: {said}."
            logger.error("%s What each rank was doing is in %s; start the run again.", told, folder)
            if rank() == min(set(after) - set(silent(before, after)), default=rank()):
                record_event(self.run_dir, "hung", step, said=said)
        os._exit(HUNG)


def verdict(before: dict[int, dict[str, Any]], after: dict[int, dict[str, Any]], step: int) -> str:
    """Who seems to hang, from two looks at the signs of all ranks."""
    lost = silent(before, after)
    if lost:
        whom = ", ".join(f"rank {of} on {after[of]['host']}" for of in lost)
        return f"{whom} {'gives' if len(lost) == 1 else 'give'} no sign of life (stopped, swapped out, or the host is gone)"
    behind = sorted(of for of, sign in after.items() if sign["step"] < step)
    if behind:
        return "; ".join(
            f"rank {of} on {after[of]['host']} is still in step {after[of]['step'] + 1}, {_at(after[of])}" for of in behind
        )
    places = Counter(sign["where"] for sign in after.values())
    usual = places.most_common(1)[0][0] if places else ""
    others = sorted(of for of, sign in after.items() if sign["where"] != usual)
    if others and len(others) <= len(after) // 2:
        whom = "; ".join(f"rank {of} on {after[of]['host']} is {_at(after[of])}" for of in others[:4])
        return f"{whom}, while most wait at {usual}"
    return f"all ranks live, and wait at {', '.join(sorted(places))}"


def _at(sign: dict[str, Any]) -> str:
    return f"{sign['doing']}, at {sign['where']}"


def _signs(run_dir: Path) -> dict[int, dict[str, Any]]:
    """The signs of the ranks of this run; a folder may hold those of an earlier start with more."""
    found = {}
    for of in range(world_size()):
        try:
            found[of] = json.loads((run_dir / HEARTBEATS / f"rank-{of:05d}.json").read_text())
        except (OSError, ValueError):
            continue
    return found


def silent(before: dict[int, dict[str, Any]], after: dict[int, dict[str, Any]]) -> list[int]:
    """The ranks whose number hasn't grown."""
    return sorted(of for of, sign in after.items() if sign["alive"] == before.get(of, {}).get("alive"))


def _kill(sign: dict[str, Any]) -> None:
    """Ends a silent rank on this host: a stopped process doesn't die of the SIGTERM that launchers send, and wait for."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(sign["pid"])
        same = abs(process.create_time() - sign["started"]) < CLOCK_STEPS  # and no later process with its number
        if same and sign["host"] == socket.gethostname():
            process.kill()


def _where(frame: FrameType | None) -> str:
    """The innermost line of this project that the main thread is at, and what it has called there."""
    names = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        ours = path.is_relative_to(PACKAGES) and "site-packages" not in path.parts
        names.append(f"{path.relative_to(PACKAGES) if ours else path.name}:{frame.f_lineno} {frame.f_code.co_name}")
        if ours:
            break
        frame = frame.f_back
    return " in ".join(dict.fromkeys([names[0], names[-1]])) if names else "an unknown place"


def _dump_flight_recorder(path: Path) -> None:
    """Torch's record of the last collectives, which it keeps by default on nccl. (With gloo, keeping one made processes end by SIGABRT.)"""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
        if dump is not None:
            path.write_bytes(dump())
