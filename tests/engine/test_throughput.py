"""Utilisation is told only where the device's peak is known."""

import pytest

from lavit_dist.engine.throughput import device_name, peak_flops, peak_memory_gib


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GeForce RTX 4090", None),
        (None, None),
    ],
)
def test_peaks_by_device_name(name: str | None, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_a_process_of_python_takes_some_memory() -> None:
    assert 0.02 < peak_memory_gib() < 100
    assert device_name() is None or peak_memory_gib() >= 0
