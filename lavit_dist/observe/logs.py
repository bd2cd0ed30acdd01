"""Logging of a run: one format, from rank 0 alone unless something is wrong."""

from __future__ import annotations

import logging
import sys
import warnings

from lavit_dist.parallel.distributed import rank

QUIET = ("deepspeed", "DeepSpeed", "megatron", "transformers", "diffusers", "urllib3", "matplotlib", "PIL", "ray", "torch")
"""Libraries whose informational lines would drown ours."""


def setup_logging(level: int = logging.INFO) -> None:
    """Sends this project's lines to standard error; ranks above 0 report warnings and errors only."""
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if rank() == 0 else f"[rank {rank()}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level if rank() == 0 else logging.WARNING)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
