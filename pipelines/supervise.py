"""Keeping a run going: its command is started again after a fault, with a wait that doubles, until it is done, stopped or hopeless."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import yaml
from filelock import FileLock, Timeout

from lavit_dist.config.base import secrets_hidden, words_without_secrets
from lavit_dist.config.command_line import FAULT, WRONG_CONFIG
from lavit_dist.data.hashing import stable_hash
from lavit_dist.engine.events import EVENTS, HUNG, STOP, record_event
from lavit_dist.errors import UserError, check
from lavit_dist.observe.process import RelayedProcess

METRICS, LATEST = "metrics.jsonl", Path("checkpoints/latest")
REPORT = "supervisor_report.txt"
POLL_SECONDS = 0.5
ENDED = 128 + signal.SIGTERM
"""Exit code after a second request to stop."""
FATAL = (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGINT, signal.SIGUSR1)
TAIL_LINES, TAIL_BYTES = 40, 1 << 20
MOST_DOUBLINGS = 20
WITHOUT_PROGRESS = 4
"""The run is given up, too, after so many times `attempts` faults in a row without a new checkpoint."""


@dataclass(frozen=True)
class Patience:
    """When to start again, and when no more."""

    attempts: int = 3
    """Faults at one step after which the run is given up; those before a start takes steps don't count here."""
    first_wait: float = 5.0
    """Seconds before the second start; each fault without a new checkpoint doubles it."""
    longest_wait: float = 600.0
    """Seconds."""


@dataclass(frozen=True)
class Failure:
    """How one start ended."""

    time: float
    code: int
    step: int
    """Steps taken."""
    checkpoint: str
    """The newest one."""
    trained: bool
    """Whether it got as far as to take steps."""
    tail: tuple[str, ...]
    """What was said last."""


def run_dir_of(command: Sequence[str], given: str | None) -> Path:
    """The run folder that `command` names by `run_dir=…`, or its --config does, unless it is `given`. Raises `UserError` when none says it."""
    named = [word.partition("=")[2] for word in command if word.startswith("run_dir=")]
    files = [path for flag, path in itertools.pairwise(command) if flag == "--config"]
    if not named and files and Path(files[-1]).is_file():
        values = yaml.safe_load(Path(files[-1]).read_text())
        named = [str(values["run_dir"])] if isinstance(values, dict) and values.get("run_dir") else []
    check(
        bool(given or named),
        f"The command {' '.join(words_without_secrets(command))} doesn't say run_dir=…, so its run folder isn't known; give --run-dir before the --.",
    )
    return Path(given or named[-1])


def supervise(command: Sequence[str], run_dir: Path, patience: Patience) -> int:
    """Runs `command` until it is done or hopeless, and returns the exit code to end with.

    SIGTERM, SIGUSR1, SIGINT and SIGHUP ask the run to save and stop, by its stop file; a second one ends it at once.
    """
    return _Supervisor(command, run_dir, patience).run()


class _Supervisor:
    def __init__(self, command: Sequence[str], run_dir: Path, patience: Patience) -> None:
        self.command, self.run_dir, self.patience = command, run_dir, patience
        self._mask = secrets_hidden(command)
        self.asked = 0
        """How often it was asked to stop."""
        self.failures: list[Failure] = []
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)

    def run(self) -> int:
        lock = FileLock(Path(tempfile.gettempdir()) / f"lavit-supervisor-{stable_hash(str(self.run_dir.absolute())):016x}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"Another supervisor is at work on {self.run_dir}; wait for it, or name another run_dir.") from None
        self._forget_request()  # of who asked an earlier start, which had ended before it could see it
        before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
        }
        try:
            return self._run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._forget_request()
            lock.release()

    def _run(self) -> int:
        waited_for = 0
        while True:
            code = self._start()
            if self.asked or (code == 0 and self._is_over()):
                return code
            newest = self.failures[-1].checkpoint if self.failures else self._checkpoint_before
            trained = "started" in self._events()
            self.failures.append(Failure(time.time(), code, self._steps(), self._checkpoint(), trained, tuple(self.tail)))
            waited_for = 0 if self.failures[-1].checkpoint != newest else waited_for + 1
            if self.run_dir.exists():  # wrong settings may have kept it from being made
                record_event(self.run_dir, "start failed", self.failures[-1].step, code=code, meaning=meaning(code))
            hopeless = self._hopeless(waited_for)
            if hopeless:
                self._report(hopeless)
                return WRONG_CONFIG if code == WRONG_CONFIG else FAULT
            doublings = min(MOST_DOUBLINGS, max(0, waited_for - 1))
            seconds = min(self.patience.longest_wait, self.patience.first_wait * 2**doublings)
            self._say(f"{meaning(code)} after step {self.failures[-1].step}; starting again in {seconds:.0f} s")
            self._wait(seconds)
            if self.asked:
                return 0  # between two starts there is nothing to save

    def _start(self) -> int:
        """Starts the command once and waits for its end, or for being asked twice to end it; nothing of it is left after that."""
        self.tail.clear()
        self._checkpoint_before = self._checkpoint()
        events = self.run_dir / EVENTS
        self._events_before = events.stat().st_size if events.exists() else 0
        process = RelayedProcess(self.command, os.environ, self._show)
        try:
            while (code := process.wait(POLL_SECONDS)) is None:
                if self.asked > 1:
                    process.end()
                    return ENDED
        except BaseException:
            process.end()
            raise
        process.end_orphans()  # a launcher that was killed leaves its ranks, which hold the run folder
        process.drain()
        return code

    def _is_over(self) -> bool:
        """Whether the run has made its product, or says that it has stopped as asked: DeepSpeed's launcher ends with 0 when it is killed, too."""
        return (self.run_dir / "model").exists() or self._events()[-1:] == ["stopped"]

    def _events(self) -> list[str]:
        """What the run has told in this start."""
        path = self.run_dir / EVENTS
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(self._events_before)
            lines = file.read().decode(errors="replace").splitlines()
        return [str(json.loads(line).get("event")) for line in lines if line.endswith("}")]

    def _hopeless(self, without_progress: int) -> str:
        """Why it makes no sense to start again, or nothing."""
        if self.failures[-1].code == WRONG_CONFIG:
            return "the settings are wrong, or need a decision"
        at_steps = Counter(failure.step for failure in self.failures if failure.trained)
        for step, times in at_steps.most_common(1):
            if times >= self.patience.attempts:
                return f"it failed {times} times after step {step}"
        if without_progress >= WITHOUT_PROGRESS * self.patience.attempts:
            return f"it failed {without_progress} times in a row without a new checkpoint"
        return ""

    def _report(self, reason: str) -> None:
        if not self.run_dir.exists():
            self._say(f"given up: {reason}")
            return
        lines = [
            f"Given up: {reason}.",
            f"Command: {' '.join(words_without_secrets(self.command))}",
            f"Newest checkpoint: {self._checkpoint() or 'none'}",
            "",
        ]
        for failure in self.failures:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(failure.time))
            lines.append(f"{when}  after step {failure.step}: {meaning(failure.code)}")
        lines += ["", "What the last start said last:", *self.failures[-1].tail]
        path = self.run_dir / REPORT
        try:
            path.write_text("\n".join(lines) + "\n")
        except OSError as error:
            self._say(f"{path} can't be written: {error}")
        self._say(f"given up: {reason}; see {path}, and {self.run_dir / EVENTS}")

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1
        if self.asked == 1:
            with contextlib.suppress(OSError):
                self.run_dir.mkdir(parents=True, exist_ok=True)
                (self.run_dir / STOP).touch()

    def _forget_request(self) -> None:
        with contextlib.suppress(OSError):
            (self.run_dir / STOP).unlink(missing_ok=True)

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.asked:
            time.sleep(min(POLL_SECONDS, seconds))

    def _steps(self) -> int:
        """Steps taken, by the last whole line of metrics.jsonl."""
        path = self.run_dir / METRICS
        if not path.exists():
            return 0
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        for line in reversed(lines):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, TypeError, KeyError):
                continue
        return 0

    def _checkpoint(self) -> str:
        path = self.run_dir / LATEST
        return path.read_text(errors="replace").strip() if path.exists() else ""

    def _show(self, line: str) -> None:
        line = self._mask(line)
        self.tail.append(line)
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    @staticmethod
    def _say(words: str) -> None:
        sys.stdout.write(f"supervisor: {words}\n")
        sys.stdout.flush()


def meaning(code: int) -> str:
    """An exit code in words."""
    # Of a signal, subprocess says the negative number, shells 128 more, and a program that ends with the former 256 less.
    number = next((number for number in FATAL if code in (-number, 128 + number, 256 - number)), None)
    if number is not None:
        name = signal.Signals(number).name
        often = " (often the kernel's, for want of memory; dmesg tells)" if number == signal.SIGKILL else ""
        return f"it was ended by {name}{often}"
    known = {0: "it ended before it was done", WRONG_CONFIG: "it refused its settings", HUNG: "it hung", FAULT: "it failed"}
    return f"{known.get(code, 'it ended')} (exit code {code})"


def check_command(command: Sequence[str]) -> None:
    """Raises `UserError` when there is nothing to run, or it isn't there."""
    if command and shutil.which(command[0]) is None:
        raise UserError(f"The command {command[0]} isn't found; give its path, or activate the environment that it is in.")
    if not command:
        raise UserError("There is no command; give it after --, as in: launcher/supervise.py -- deepspeed launcher/pretrain.py …")
