"""Images of a set with latents, in an order that depends on nothing but the seed and the step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lavit_dist.data.id_shards import IdShards
from lavit_dist.data.image_order import places
from lavit_dist.data.order import DOCUMENTS, epoch_blocks, permutation
from lavit_dist.errors import UserError


@dataclass(frozen=True)
class LatentBatch:
    """One rank's share of a global batch."""

    indices: list[int]
    """The images' places in the set."""
    codes: list[NDArray[np.int64]]
    """Of each image."""
    latents: NDArray[np.float16]
    """[batch, channel, height, width]."""


class LatentBatches:
    """The global batches of an endless training run over a set that `data_prep/cache_latents.py` made, and this rank's share of each.

    Position p = step x global_batch_size + i falls in epoch p // images. An epoch takes block after block of shuffled shards, and the images
    of a block in shuffled order, so that a remote set is read shard by shard. Every world size sees the same.
    """

    def __init__(self, shards: IdShards, global_batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        """Raises `UserError` for a set without latents and a batch that the ranks can't share."""
        if shards.manifest.encoding.latents is None:
            raise UserError(
                f"The id set {shards.manifest.folder} has no latents; make a set that has with data_prep/cache_latents.py."
            )
        self.shards, self.global_batch_size, self.seed = shards, global_batch_size, seed
        self._places = places(global_batch_size, rank, world_size)
        self._starts = np.cumsum([0, *(record.documents for record in shards.manifest.shards)])
        self._blocks = lru_cache(maxsize=2)(self._find_blocks)
        self._block = lru_cache(maxsize=2)(self._order_block)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def batch(self, step: int) -> LatentBatch:
        """This rank's share of batch `step`: a pure function of the set, the seed and the step."""
        indices = [self._index(step * self.global_batch_size + place) for place in self._places]
        codes, latents = [], []
        for index in indices:
            number = int(np.searchsorted(self._starts, index, side="right")) - 1
            shard, document = self.shards[number], index - int(self._starts[number])
            codes.append(shard.segments(document)[0][1].astype(np.int64))
            latents.append(shard.latents[document])
        return LatentBatch(indices, codes, np.stack(latents))

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self))
        _, starts = self._blocks(epoch)
        block = int(np.searchsorted(starts, place, side="right")) - 1
        return int(self._block(epoch, block)[place - int(starts[block])])

    def _find_blocks(self, epoch: int) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
        """The shards of each block, and the place where it starts in the epoch."""
        blocks = epoch_blocks(self._starts, self.seed, epoch)
        sizes = np.diff(self._starts)
        return blocks, np.cumsum([0, *(sizes[block].sum() for block in blocks)])

    def _order_block(self, epoch: int, block: int) -> NDArray[np.int64]:
        blocks, _ = self._blocks(epoch)
        following = blocks[block + 1] if block + 1 < len(blocks) else self._blocks(epoch + 1)[0][0]
        self.shards.prefetch([*blocks[block].tolist(), *following.tolist()])
        images = np.concatenate([np.arange(self._starts[shard], self._starts[shard + 1]) for shard in blocks[block]])
        return images[permutation(len(images), self.seed, epoch, DOCUMENTS, block)]
