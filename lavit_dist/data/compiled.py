"""Loops over documents and tokens, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from numba import njit

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(function: Function) -> Function:
    """`numba.njit` that lets go of the interpreter's lock, and keeps what it compiled beside the file or in the user's cache folder.

    Where neither can be written, as in some containers, every process compiles anew. What is kept is compiled again when the function's own
    file changes, not when another does: functions that call each other belong in one file.
    """
    try:
        return cast(Function, njit(cache=True, nogil=True)(function))
    except RuntimeError:  # numba's "no locator available"
        return cast(Function, njit(nogil=True)(function))
