"""How a process without a GPU gets the memory of its tensors."""

from __future__ import annotations

import ctypes
import functools

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's names, of `malloc.h`."""
KEPT_BYTES = 2**30


@functools.cache
def keep_freed_memory() -> None:
    """Without a GPU, lets glibc keep freed blocks of less than 1 GiB, and 1 GiB at the end of its memory, for what is asked for next.

    By default blocks of more than 32 MB, as activations, gradients and logits are, come from the operating system and go back to it each
    time, which clears them and maps them page by page: a tenth of a training step on a CPU. glibc before 2.35, which takes no such limit, and
    other C libraries are left as they are. To be called when weights have been read, since gaps that this left would be kept.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if not torch.cuda.is_available() and mallopt is not None and mallopt(M_MMAP_THRESHOLD, KEPT_BYTES):
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
