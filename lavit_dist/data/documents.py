"""Documents as the language model sees them: which order, with or without the caption, and how long.

What is chosen for a document is a hash of (seed, epoch, document), so it doesn't depend on what else is read, or where.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lavit_dist.data.id_shard import IMAGE, IdShardHead
from lavit_dist.data.order import CAPTION_DROPOUT, ORIENTATION, UInt64Array, fractions


def full_lengths(shard: IdShardHead) -> NDArray[np.int64]:
    """Tokens of each document of a shard with its caption: segments, [IMG] and [/IMG] around each image, EOS."""
    return shard.per_document(shard.segment_lengths) + 2 * shard.per_document(shard.segment_kinds == IMAGE) + 1


def caption_dropped(hashes: UInt64Array, seed: int, epoch: int, caption_dropout: float) -> NDArray[np.bool_]:
    """Which documents lose their caption in an epoch (training for classifier-free guidance)."""
    return fractions(hashes, seed, epoch, CAPTION_DROPOUT) < caption_dropout


def text_first(hashes: UInt64Array, seed: int, epoch: int) -> NDArray[np.bool_]:
    """Which pairs are ordered [text, image] in an epoch; the others are [image, text]."""
    return fractions(hashes, seed, epoch, ORIENTATION) < 0.5
