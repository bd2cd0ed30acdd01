"""Failures of machines and networks, and want of memory, told from defects of the program and said in a sentence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from lavit_dist.errors import Fault, UserError

LOST_PEER = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL error",
    "Socket Timeout",
)
"""What libraries say when another process can't be reached."""
NO_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory", "not enough memory")


@contextmanager
def outside_faults_told(doing: str, *, advice: str = "", retry: bool = True) -> Iterator[None]:
    """Turns failures that come from outside into a `Fault` that says what the process was `doing`, a clause such as `in step 7`.

    Want of memory comes with `advice`, and is a `UserError` unless `retry` says that the same thing went well before.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in NO_MEMORY):
            raise (Fault if retry else UserError)(f"Memory ran out {doing} ({first}). {advice}".strip()) from error
        if isinstance(error, dist.DistError) or any(words in str(error) for words in LOST_PEER):
            raise Fault(
                f"Rank {os.environ.get('RANK', '0')} lost another process {doing} ({first}); look at what that one said last, or at the network between their"
                " hosts, and start the run again: it goes on from its newest checkpoint."
            ) from error
        raise
