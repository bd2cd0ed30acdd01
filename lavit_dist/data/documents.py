"""Documents as the language model sees them: which order, with or without the caption, and how long.

What is chosen for a document is a hash of (seed, epoch, document), so it doesn't depend on what else is read, or where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lavit_dist.data.id_shard import IMAGE, IdShardHead
from lavit_dist.data.order import CAPTION_DROPOUT, ORIENTATION, UInt64Array, fractions


@dataclass(frozen=True)
class ShardDocuments:
    """What packing needs to know of every document of some shards: no payload is read for it."""

    hashes: UInt64Array
    """`document_hash` of each document."""
    full_lengths: NDArray[np.int64]
    """Tokens with the caption: segments, [IMG] and [/IMG] around each image, EOS."""
    short_lengths: NDArray[np.int64]
    """Tokens without the caption; equal to `full_lengths` for what is not a pair and so never loses its text."""

    @classmethod
    def of(cls, shard: IdShardHead) -> ShardDocuments:
        """Those of one shard, in its order."""
        segments = np.diff(shard.segment_starts)
        owner = np.repeat(np.arange(len(shard)), segments)
        image_of = shard.segment_kinds == IMAGE
        images = np.bincount(owner, weights=image_of, minlength=len(shard)).astype(np.int64)
        text_ids = np.bincount(owner, weights=shard.segment_lengths * ~image_of, minlength=len(shard)).astype(np.int64)
        ids = np.bincount(owner, weights=shard.segment_lengths, minlength=len(shard)).astype(np.int64)
        full = ids + 2 * images + 1
        pair = (segments == 2) & (images == 1)
        return cls(shard.document_hash, full, full - text_ids * pair)

    @classmethod
    def joined(cls, parts: Sequence[ShardDocuments]) -> ShardDocuments:
        """Those of several shards, one after the other."""
        names = ("hashes", "full_lengths", "short_lengths")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def caption_dropped(hashes: UInt64Array, seed: int, epoch: int, caption_dropout: float) -> NDArray[np.bool_]:
    """Which documents lose their caption in an epoch (training for classifier-free guidance)."""
    return fractions(hashes, seed, epoch, CAPTION_DROPOUT) < caption_dropout


def text_first(hashes: UInt64Array, seed: int, epoch: int) -> NDArray[np.bool_]:
    """Which pairs are ordered [text, image] in an epoch; the others are [image, text]."""
    return fractions(hashes, seed, epoch, ORIENTATION) < 0.5
