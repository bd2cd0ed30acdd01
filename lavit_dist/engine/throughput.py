"""How hard the hardware works: model FLOPs utilisation, and peak memory."""

from __future__ import annotations

import resource
import sys

import torch

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
"""Dense bf16 tensor-core peak of a device, FLOP/s, by a part of its name (NVIDIA's data sheets, SXM form)."""
SLOWER_FORMS = ("H100 PCIe", "H100 NVL", "H200 NVL")
"""Forms of these that clock lower, under a power limit of the machine's maker: no peak is claimed for them."""


def peak_flops(device_name: str | None) -> float | None:
    """The bf16 peak of the device so named; None for one that is not in the table, or of a form that is slower."""
    if device_name is None or any(form in device_name for form in SLOWER_FORMS):
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def device_name() -> str | None:
    """The name of this process's accelerator; None on a CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def peak_memory_gib() -> float:
    """Peak memory of this process so far, GiB: the accelerator's allocations, or resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
