"""One caption of each image per epoch, chosen from columns alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lavit_dist.data.id_shard import IMAGE, IdShardHead
from lavit_dist.data.order import CAPTIONS, UInt64Array, hash64


def caption_groups(shard: IdShardHead) -> NDArray[np.int64]:
    """The group of each document, numbered from 0 in their order: an image's captions, which stand one behind the other in its shard.

    They have the image's location in common, and caption numbers that rise. Documents without an image are groups of one.
    """
    has_image = shard.per_document(shard.segment_kinds == IMAGE) > 0
    tars, offsets = shard.source
    follows = (tars[1:] == tars[:-1]) & (offsets[1:] == offsets[:-1]) & (shard.caption_index[1:] > shard.caption_index[:-1])
    begins = np.ones(len(shard), np.bool_)
    begins[1:] = ~(follows & has_image[1:] & has_image[:-1])
    return np.cumsum(begins) - 1


def one_of_each(
    groups: NDArray[np.int64], hashes: UInt64Array, usable: NDArray[np.bool_], seed: int, epoch: int
) -> NDArray[np.bool_]:
    """Which documents an epoch has if it takes one of the usable ones of each group.

    They take turns, beginning with the one that a hash names: in any n epochs on end each of n comes up once, which independent
    choices would not give.
    """
    candidates = np.flatnonzero(usable)
    _, firsts, counts = np.unique(groups[candidates], return_index=True, return_counts=True)
    hashed = hash64(hashes[candidates[firsts]], seed, CAPTIONS) % counts.astype(np.uint64)
    turns = (hashed.astype(np.int64) + epoch) % counts
    chosen = np.zeros(len(usable), np.bool_)
    chosen[candidates[firsts + turns]] = True
    return chosen
