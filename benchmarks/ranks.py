"""Starting gloo processes on this machine, as the deepspeed launcher would."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lavit_dist.parallel.distributed import free_port

POLL_SECONDS = 0.1


def run_ranks(program: str | Path, world_size: int, *arguments: str, timeout: float = 300) -> None:
    """Runs it on `world_size` ranks; raises `SystemExit` with what the ranks said when one fails, or when they take too long."""
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as files:  # not pipes: a full one would stop a rank that says much
        said = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(world_size)]
        ranks = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", str(program), *arguments],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            for rank, output in enumerate(said)
        ]
        try:
            while time.monotonic() < deadline and _all_well([rank.poll() for rank in ranks]):
                time.sleep(POLL_SECONDS)
        finally:
            for rank in ranks:
                rank.kill()
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            for output in said:
                output.seek(0)
            raise SystemExit("\n".join(f"rank {number}: {output.read()}" for number, output in enumerate(said)))


def _all_well(codes: list[int | None]) -> bool:
    """Whether some ranks still run, and none has failed."""
    return None in codes and set(codes) <= {None, 0}
