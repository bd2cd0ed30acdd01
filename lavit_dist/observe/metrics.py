"""What a training run reports: a log line, metrics.jsonl and TensorBoard files."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from lavit_dist.config.training import LoggingConfig
from lavit_dist.engine.loop import Callback
from lavit_dist.files import write_atomically
from lavit_dist.parallel.distributed import rank

logger = logging.getLogger(__name__)
METRICS_FILE = "metrics.jsonl"
RATES = ("tokens", "images")
"""Metrics that count work done in a step; the log line adds them per second."""
FORMS = {
    "mfu": "MFU {:.1%}",
    "memory_gib": "memory {:.1f} GiB",
    "data_wait": "data wait {:.3f} s",
    "padding": "padding {:.1%}",
    "seconds": "step {:.3f} s",
}
"""How the log line says what has a unit; everything else is its name and number."""


class MetricsCallback(Callback):
    """Writes every step's metrics to RUN_DIR/metrics.jsonl and TensorBoard, and a log line every few steps, from rank 0.

    A resumed run, or one that goes back, first drops the records of steps that are about to be taken again.
    """

    def __init__(self, run_dir: Path, logging_config: LoggingConfig) -> None:
        self.run_dir = run_dir
        self.config = logging_config
        self.active = rank() == 0
        self.total_steps = self.written = 0

    def on_start(self, start_step: int, total_steps: int) -> None:
        self.total_steps, self.window = total_steps, time.perf_counter()
        self.window_step = start_step
        self.window_work = dict.fromkeys(RATES, 0.0)
        if not self.active:
            return
        if start_step < self.written:  # the run has gone back
            self.on_end()
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / METRICS_FILE
        kept = [line for line in read_lines(path) if json.loads(line)["step"] <= start_step] if start_step else []
        content = "".join(line + "\n" for line in kept).encode()
        if not path.exists() or path.read_bytes() != content:
            write_atomically(path, content)
        self.file = path.open("ab", buffering=0)
        self.unwritten: list[bytes] = []
        self.board = None
        if self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=start_step + 1)

    def after_step(self, step: int, metrics: Mapping[str, float]) -> None:
        if not self.active:
            return
        self.written = step
        self._write(json.dumps({"step": step, **metrics}).encode() + b"\n")
        if self.board is not None:
            for name, value in metrics.items():
                self.board.add_scalar(name, value, step)
        for name in RATES:
            self.window_work[name] += metrics.get(name, 0.0)
        if step % self.config.every_steps == 0 or step == self.total_steps:
            self._log_line(step, metrics)

    def on_end(self) -> None:
        if self.active:
            self.file.close()
            if self.board is not None:
                self.board.close()

    def _write(self, line: bytes) -> None:
        """Appends a line, after those that a full disk didn't take."""
        self.unwritten.append(line)
        try:
            while self.unwritten:
                written = self.file.write(self.unwritten[0])
                self.unwritten[0] = self.unwritten[0][written:]
                if not self.unwritten[0]:
                    del self.unwritten[0]
        except OSError as error:
            logger.warning(
                "%s can't be written to, and %d records wait: %s", self.run_dir / METRICS_FILE, len(self.unwritten), error
            )

    def _log_line(self, step: int, metrics: Mapping[str, float]) -> None:
        now = time.perf_counter()
        elapsed = max(now - self.window, 1e-9)
        left = (self.total_steps - step) * elapsed / (step - self.window_step)
        fields = [FORMS.get(name, f"{name} {{:.4g}}").format(value) for name, value in metrics.items()]
        fields += [f"{name}/s {work / elapsed:,.0f}" for name, work in self.window_work.items() if work]
        logger.info("step %d/%d | %s | left %d:%02d", step, self.total_steps, " | ".join(fields), *divmod(int(left), 60))
        self.window, self.window_step = now, step
        self.window_work = dict.fromkeys(RATES, 0.0)


def read_lines(path: Path) -> list[str]:
    """The lines of a JSONL file that hold an object each; a line that a crash cut short is left out. An absent file has none."""
    if not path.exists():
        return []
    return [line for line in path.read_text(errors="replace").splitlines(keepends=False) if _is_record(line)]


def _is_record(line: str) -> bool:
    try:
        return "step" in json.loads(line)
    except (ValueError, TypeError):
        return False
