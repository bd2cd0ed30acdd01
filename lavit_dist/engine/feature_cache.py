"""Frozen features of images already seen, in memory and on disk, so that later epochs cost no tower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lavit_dist.engine.feature_store import FeatureStore
from lavit_dist.errors import check


class FeatureCache:
    """`encode`, from keys and pixels [batch, 3, H, W] to features [batch, patch, width], remembered by key.

    Features are rounded to `dtype` whether they come out of the cache or not, so that results don't depend on what it holds. It keeps
    what comes first: with `memory_bytes` in the memory of the host, with `disk_bytes` in `folder`, which all ranks of a machine and later
    runs share.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str], Tensor], Tensor],
        *,
        memory_bytes: int,
        disk_bytes: int = 0,
        folder: str | Path | None = None,
        digest: str = "",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`digest` names all that features depend on beside the key: the tower's weights and the preprocessing.

        Raises `UserError` when the folder holds features of another digest or type.
        """
        check(
            (folder is None) == (disk_bytes == 0),
            f"The feature cache has the folder {folder} and {disk_bytes} bytes of disk; give both, or neither.",
        )
        assert folder is None or digest, "features on disk outlive the tower that made them"
        self.encode = encode
        self.dtype = dtype
        self.hits = 0
        """Images whose features were remembered."""
        self._room = memory_bytes
        self._memory: dict[str, Tensor] = {}
        self._store = None if folder is None else FeatureStore(Path(folder), disk_bytes, digest=digest, dtype=dtype)

    @torch.no_grad()
    def __call__(self, keys: Sequence[str], pixel_values: Tensor) -> Tensor:
        """Features [batch, patch, width] of images with these keys, of the pixels' type and on their device.

        Equal keys must mean equal pixels; the pixels of remembered images are not looked at.
        """
        known = self._remembered(keys)
        unknown = [place for place in range(len(keys)) if place not in known]
        self.hits += len(known)
        parts, order = [], [*known, *unknown]
        if known:
            parts.append(torch.stack(list(known.values())).to(pixel_values))
        if unknown:
            fresh = self.encode([keys[place] for place in unknown], pixel_values[unknown]).to(self.dtype)
            if self._wants_more:
                self._remember({keys[place]: features for place, features in zip(unknown, fresh.cpu(), strict=True)})
            parts.append(fresh.to(pixel_values))
        return torch.cat(parts)[torch.tensor(order, device=pixel_values.device).argsort()]

    @property
    def _wants_more(self) -> bool:
        return self._room > 0 or (self._store is not None and not self._store.full)

    def _remembered(self, keys: Sequence[str]) -> dict[int, Tensor]:
        """Features [patch, width] by place in the batch."""
        known = {place: self._memory[key] for place, key in enumerate(keys) if key in self._memory}
        if self._store is not None:
            stored = self._store.get([key for place, key in enumerate(keys) if place not in known])
            self._keep(stored)
            known |= {place: stored[key] for place, key in enumerate(keys) if place not in known and key in stored}
        return known

    def _remember(self, fresh: dict[str, Tensor]) -> None:
        self._keep(fresh)
        if self._store is not None:
            self._store.put(fresh)

    def _keep(self, features: dict[str, Tensor]) -> None:
        for key, value in features.items():
            if key in self._memory:
                continue
            if value.nbytes > self._room:
                self._room = 0  # all features are of one size
                return
            self._room -= value.nbytes
            self._memory[key] = value.clone()  # a view would hold the whole batch
