"""The splits of a pair set."""

from __future__ import annotations

from pathlib import Path

from lavit_dist.data.pairs import SPLITS, list_shards


def list_splits(folder: str | Path) -> dict[str, list[Path]]:
    """The tars of each split that a pair set has; tars directly in the folder are a split `train`.

    Raises `UserError` when there are neither.
    """
    folder = Path(folder)
    found = {split: sorted((folder / split).glob("*.tar")) for split in SPLITS}
    return {split: shards for split, shards in found.items() if shards} or {SPLITS[0]: list_shards(folder)}
