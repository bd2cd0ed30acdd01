"""Whether NVIDIA's apex is installed, and a plain word about the other package of that name."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from lavit_dist.errors import UserError


def check_apex() -> None:
    """Raises `UserError` when the `apex` that Python would import isn't NVIDIA's. Imports nothing."""
    spec = importlib.util.find_spec("apex")
    if spec is not None and not _is_nvidias(spec.submodule_search_locations):
        raise UserError(
            f"The package 'apex' at {spec.origin or list(spec.submodule_search_locations or [])} is an unrelated web toolkit from PyPI,"
            " not NVIDIA's, and libraries that look for NVIDIA's would trip over it; run `pip uninstall apex` (NVIDIA's is built from"
            " https://github.com/NVIDIA/apex, and is optional)."
        )


def has_apex_kernels(extension: str) -> bool:
    """Whether NVIDIA's apex is installed with its compiled `extension`; built as Python only, its classes can't be made."""
    return importlib.util.find_spec("apex") is not None and importlib.util.find_spec(extension) is not None


def _is_nvidias(locations: object) -> bool:
    return any((Path(location) / "normalization").is_dir() for location in locations or ())  # type: ignore[attr-defined]
