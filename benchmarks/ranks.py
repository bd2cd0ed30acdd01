"""Starting gloo processes on this machine, as the deepspeed launcher would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lavit_dist.parallel.distributed import free_port


def run_ranks(program: str | Path, world_size: int, *arguments: str, timeout: float = 300) -> None:
    """Runs it on `world_size` ranks; raises `SystemExit` with what the ranks said when one fails."""
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(program), *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        said = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(rank.returncode for rank in ranks):
        raise SystemExit("\n".join(f"rank {number}: {text}" for number, text in enumerate(said)))
