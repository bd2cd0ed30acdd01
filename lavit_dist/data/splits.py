"""The splits of a pair set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec

from lavit_dist.data.pairs import SPLITS
from lavit_dist.data.shard_list import Shard, list_tars
from lavit_dist.errors import UserError


def list_splits(pairs: str | Sequence[str], storage_options: Mapping[str, Any]) -> dict[str, list[Shard]]:
    """The tars of each split that a pair set has: train/ and heldout/ of a folder; all other tars are a split `train`.

    Raises `UserError`, naming the setting `pairs`, when there are none.
    """
    if isinstance(pairs, str) and not any(sign in pairs for sign in "*?[{") and not pairs.endswith(".tar"):
        folders = {split: f"{pairs.rstrip('/')}/{split}" for split in SPLITS}
        found = {split: folder for split, folder in folders.items() if _holds_tars(folder, storage_options)}
        if found:
            return {split: list_tars(folder, storage_options, "pairs") for split, folder in found.items()}
    return {SPLITS[0]: list_tars(pairs, storage_options, "pairs")}


def _holds_tars(folder: str, storage_options: Mapping[str, Any]) -> bool:
    if "://" not in folder:
        return any(Path(folder).glob("*.tar"))
    try:
        system, path = fsspec.core.url_to_fs(folder, **storage_options)
        return any(str(name).endswith(".tar") for name in system.ls(path, detail=False))
    except (FileNotFoundError, PermissionError):  # a store may forbid listing and still hand out files
        return False
    except ImportError as error:
        raise UserError(f"pairs {folder} needs a package that is not installed: {error}.") from error
    except Exception as error:  # every store raises exceptions of its own
        raise UserError(f"pairs {folder} can't be listed ({type(error).__name__}: {error}); check the URL and access.") from error
