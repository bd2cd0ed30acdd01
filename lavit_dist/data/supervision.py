"""Which tokens of a document have a loss: those behind a prefix that the model is given. What DocumentsConfig.supervise means, in code."""

from __future__ import annotations

from typing import Any

from numba import njit

from lavit_dist.config.documents import Supervise
from lavit_dist.data.id_shard import IMAGE, TEXT

ALL, SECOND, GENERATED = range(3)
SUPERVISE: dict[Supervise, int] = {"all": ALL, "second": SECOND, "generated": GENERATED}
"""The policies as compiled code knows them."""


@njit(cache=True, nogil=True)
def given_segments(kinds: Any, supervise: int) -> int:
    """How many of a document's leading segments, of `kinds`, have no loss."""
    if supervise == SECOND and kinds.size > 1:
        return 1
    if supervise == GENERATED:
        for segment in range(kinds.size):
            if kinds[segment] == TEXT:
                return segment  # images alone come before the first text
    return 0


@njit(cache=True, nogil=True)
def segment_tokens(kind: int, length: int) -> tuple[int, int]:
    """The tokens of a segment of `length` ids, and how many of them are of an image as `MicroBatch.modality` has it: codes and [/IMG]."""
    return (length + 2, length + 1) if kind == IMAGE else (length, 0)
