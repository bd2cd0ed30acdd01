"""NVIDIA apex's fused RMSNorm where apex is installed, and a plain word about the other package of that name."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from torch import nn

from lavit_dist.errors import UserError
from lavit_dist.models.llama import RMSNorm


def check_apex() -> None:
    """Raises `UserError` when the `apex` that Python would import isn't NVIDIA's. Imports nothing."""
    spec = importlib.util.find_spec("apex")
    if spec is not None and not _is_nvidias(spec.submodule_search_locations):
        raise UserError(
            f"The package 'apex' at {spec.origin or list(spec.submodule_search_locations or [])} is an unrelated web toolkit from PyPI,"
            " not NVIDIA's, and libraries that look for NVIDIA's would trip over it; run `pip uninstall apex` (NVIDIA's is built from"
            " https://github.com/NVIDIA/apex, and is optional)."
        )


def rms_norm(width: int, eps: float) -> nn.Module:
    """An RMSNorm with a `weight` [width]: apex's fused kernel if it is installed, else the plain one."""
    if importlib.util.find_spec("apex") is None:
        return RMSNorm(width, eps)
    from apex.normalization import FusedRMSNorm

    fused: nn.Module = FusedRMSNorm(width, eps=eps)
    return fused


def _is_nvidias(locations: object) -> bool:
    return any((Path(location) / "normalization").is_dir() for location in locations or ())  # type: ignore[attr-defined]
