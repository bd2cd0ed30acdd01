"""Image-text pairs from a list of tars, in an order that depends on nothing but the seed and the step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from lavit_dist.config.images import MAX_PIXELS
from lavit_dist.data.hashing import stable_hash
from lavit_dist.data.image import normalise, resize
from lavit_dist.data.pairs import PairSample, read_pairs
from lavit_dist.data.picture import decode_image
from lavit_dist.data.quarantine import Quarantined, SampleError, count_reasons
from lavit_dist.data.tar_reader import read_bytes
from lavit_dist.errors import UserError, check

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairBatch:
    """One rank's share of a global batch; `pixel_values` is float32 [batch, 3, H, W]."""

    indices: list[int]
    """Their places in the dataset, which tell apart pairs of different tars that have the same key."""
    keys: list[str]
    pixel_values: torch.Tensor
    captions: list[str]


class PairDataset:
    """The pairs of some tars, by index. Resized pictures are kept in memory up to `cache_bytes`, so small sets are decoded once."""

    def __init__(
        self, shards: Sequence[Path], image_size: int, *, max_pixels: int = MAX_PIXELS, cache_bytes: int = 1 << 30
    ) -> None:
        self.samples: list[PairSample] = []
        self.quarantined: list[Quarantined] = []
        for shard in shards:
            pairs, quarantined = read_pairs(shard)
            self.samples += pairs
            self.quarantined += quarantined
        if self.quarantined:
            logger.warning("%d samples can't be used: %s", len(self.quarantined), count_reasons(self.quarantined))
        if not self.samples:
            raise UserError(
                f"None of {', '.join(map(str, shards))} holds a usable pair ({count_reasons(self.quarantined)}); ingest the data again."
            )
        self.image_size = image_size
        self.max_pixels = max_pixels
        self._room = cache_bytes // (3 * image_size**2)
        self._cache: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def pixels(self, index: int) -> torch.Tensor:
        """The preprocessed picture of sample `index`, float32 [3, H, W]; raises `SampleError` when it can't be decoded."""
        resized = self._cache.get(index)
        if resized is None:
            image = decode_image(read_bytes(self.samples[index].image_location), self.max_pixels)
            resized = resize(image, self.image_size)
            if len(self._cache) < self._room:
                self._cache[index] = resized
        return normalise(resized)


class PairBatches:
    """The global batches of an endless training run over `dataset`, and this rank's share of each.

    Position p = step x global_batch_size + i falls in epoch p // len(dataset), whose order is a permutation seeded by (seed, epoch).
    The rank takes the positions with i % world_size == rank: their union over the ranks is the same for every world size.
    """

    def __init__(self, dataset: PairDataset, global_batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        check(
            global_batch_size > 0 and global_batch_size % world_size == 0,
            f"global_batch_size {global_batch_size} is not a positive multiple of the {world_size} data-parallel ranks; choose one that is.",
        )
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.quarantined: dict[str, Quarantined] = {}
        self._order = lru_cache(maxsize=2)(lambda epoch: epoch_order(len(dataset), seed, epoch))

    def batch(self, step: int) -> PairBatch:
        """This rank's share of batch `step`: a pure function of the data, the seed and the step.

        A picture that can't be decoded gives way to the next one of its epoch's order; it is logged once and kept in `quarantined`.
        """
        first = step * self.global_batch_size
        indices: list[int] = []
        keys, pixels, captions = [], [], []
        for position in range(first + self.rank, first + self.global_batch_size, self.world_size):
            epoch, place = divmod(position, len(self.dataset))
            index, values = self._readable(epoch, place)
            sample = self.dataset.samples[index]
            indices.append(index)
            keys.append(sample.key)
            pixels.append(values)
            captions.append(sample.captions[stable_hash("caption", self.seed, epoch, sample.key) % len(sample.captions)])
        return PairBatch(indices, keys, torch.stack(pixels), captions)

    def _readable(self, epoch: int, place: int) -> tuple[int, torch.Tensor]:
        order = self._order(epoch)
        for offset in range(len(order)):
            index = int(order[(place + offset) % len(order)])
            sample = self.dataset.samples[index]
            try:
                return index, self.dataset.pixels(index)
            except SampleError as error:
                if sample.key not in self.quarantined:
                    self.quarantined[sample.key] = Quarantined.of(sample.key, "decode", error)
                    logger.warning("%s in %s is skipped: %s", sample.key, sample.image_location.shard, error)
        reasons = count_reasons(self.quarantined.values())
        raise UserError(f"None of the {len(order)} pictures of the set can be decoded ({reasons}); ingest the data again.")


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of 0..size-1 in which an epoch visits a set: a pure function of its arguments."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(size)
