"""Starting img2dataset in its own environment, watching it, and ending it with all that it started."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavit_dist.data import img2dataset_program
from lavit_dist.errors import UserError

logger = logging.getLogger(__name__)
PROGRAM = Path(img2dataset_program.__file__)
LOOK_EVERY = 0.5
"""Seconds between two looks at what has been written."""
SAY_EVERY = 60.0
"""Seconds between two lines about how far it is."""
SILENT = {
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "ALBUMENTATIONS_NO_TELEMETRY": "1",
    "WANDB_MODE": "disabled",
    "WANDB_ERROR_REPORTING": "false",
}
"""Keeps libraries that img2dataset imports from asking the internet for news of themselves."""
FIND_VERSION = "import importlib.metadata; print(importlib.metadata.version('img2dataset'))"


@dataclass(frozen=True)
class Img2dataset:
    """The downloader and the settings that all its runs have in common."""

    python: Path
    """Interpreter of its environment."""
    arguments: Mapping[str, Any]
    """Of `img2dataset.download`."""
    limits: Mapping[str, Any]
    """Of `img2dataset_program.make_opener`."""
    max_pixels: int
    """Pictures with more pixels than this aren't decoded."""
    stall_timeout: float
    """Seconds without any progress after which a run is ended."""
    log: Path
    """Its own words are added to this file."""

    def find_version(self) -> str:
        """The version in the environment. Raises `UserError` that says how to make one, when there is none."""
        remedy = "make it with `make downloader`, or name the interpreter of an environment that has img2dataset"
        try:
            found = subprocess.run([self.python, "-I", "-c", FIND_VERSION], capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(f"downloader_python {self.python} can't be run ({error}); {remedy}.") from error
        if found.returncode:
            raise UserError(f"The environment of downloader_python {self.python} has no img2dataset; {remedy}.")
        return found.stdout.strip()

    def run(self, attempt: Path, samples_per_shard: int) -> int | None:
        """Downloads the addresses in `attempt`/in/*.parquet to `attempt`/out, in shards of at most so many rows, none with rows of two files.

        Returns the exit code, or None when it stood still and was ended. Whatever way this is left, also by SIGKILL, nothing that was
        started here goes on: the program ends itself and its workers when its standard input closes.
        """
        job = attempt / "job.json"
        arguments = {
            **self.arguments,
            "url_list": str((attempt / "in").absolute()),
            "output_folder": str((attempt / "out").absolute()),
            "number_sample_per_shard": samples_per_shard,
        }
        job.write_text(json.dumps({"arguments": arguments, "limits": self.limits}))
        environment = {**os.environ, **SILENT, "OPENCV_IO_MAX_IMAGE_PIXELS": str(self.max_pixels)}
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [self.python, "-I", PROGRAM, job],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            try:
                return self._watch(process, attempt)
            finally:
                _end(process)

    def describe_end(self, code: int) -> str:
        """How a run ended, in words, with the last that it said."""
        lines = self.log.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
        how = (
            f"was killed by signal {-code}, as a machine does that is short of memory"
            if code < 0
            else f"ended with exit code {code}"
        )
        return f"{how}; the last line of {self.log} is: {last}"

    def _watch(self, process: subprocess.Popen[bytes], attempt: Path) -> int | None:
        seen, progress_at, said_at = dict[Path, int](), time.monotonic(), time.monotonic()
        while True:
            try:
                return process.wait(LOOK_EVERY)
            except subprocess.TimeoutExpired:
                pass
            now, found = time.monotonic(), _sizes(attempt)
            if found != seen:
                seen, progress_at = found, now
            if now - said_at > SAY_EVERY:
                said_at = now
                logger.info("img2dataset has finished %d shards of this round", sum(path.suffix == ".json" for path in found) - 1)
            if now - progress_at > self.stall_timeout:
                logger.warning("img2dataset has stood still for %.0f seconds and is ended; see %s", self.stall_timeout, self.log)
                return None


def _sizes(folder: Path) -> dict[Path, int]:
    """The files in a folder that others write to and delete from."""
    sizes = {}
    for path in folder.rglob("*"):
        try:
            sizes[path] = path.stat().st_size
        except FileNotFoundError:
            continue
    return sizes


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the program's process group: workers outlive a program that was killed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()
