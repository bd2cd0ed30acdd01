"""Sums of gradients in fp32, of terms in less precision."""

from __future__ import annotations

from torch import Tensor

CPU_NUMBERS = 2**18
"""How many are added at once on a CPU: what stays in its caches."""


def add_to(total: Tensor, term: Tensor) -> None:
    """Adds `term` to fp32 `total` of its shape.

    To add bf16 to fp32, torch first converts all of it on a CPU, into memory of its own; here it does so part by part.
    """
    if total.device.type != "cpu" or total.dtype == term.dtype:
        total += term
        return
    rows = max(CPU_NUMBERS * len(total) // max(total.numel(), 1), 1)
    for few, of_term in zip(total.split(rows), term.split(rows), strict=True):
        few += of_term
