"""Documents as the language model sees them: which order, with or without the caption, how long, and their tokens.

What is chosen for a document is a hash of (seed, epoch, document), so it doesn't depend on what else is read, or where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lavit_dist.data.id_shard import IMAGE, TEXT, IdShard
from lavit_dist.data.order import CAPTION_DROPOUT, ORIENTATION, UInt64Array, fractions
from lavit_dist.models.vocabulary import Vocabulary

IntArray = NDArray[np.integer]
Segment = tuple[int, IntArray]


@dataclass(frozen=True)
class DocumentTable:
    """What is known of every document of a set: no payload is read for it."""

    full_lengths: NDArray[np.int64]
    """Tokens with the caption: segments, [IMG] and [/IMG] around each image, EOS."""
    shard_starts: NDArray[np.int64]
    """Shard i holds documents `shard_starts[i]` to `shard_starts[i + 1]`."""

    @classmethod
    def of(cls, shards: Sequence[IdShard]) -> DocumentTable:
        """The table of the documents in `shards`, in that order."""
        return cls(
            full_lengths=np.concatenate([full_lengths(shard) for shard in shards]),
            shard_starts=np.cumsum([0, *map(len, shards)]),
        )


def caption_dropped(hashes: UInt64Array, seed: int, epoch: int, caption_dropout: float) -> NDArray[np.bool_]:
    """Which documents lose their caption in an epoch (training for classifier-free guidance)."""
    return fractions(hashes, seed, epoch, CAPTION_DROPOUT) < caption_dropout


def text_first(hashes: UInt64Array, seed: int, epoch: int) -> NDArray[np.bool_]:
    """Which pairs are ordered [text, image] in an epoch; the others are [image, text]."""
    return fractions(hashes, seed, epoch, ORIENTATION) < 0.5


def arrange(segments: list[Segment], *, text_leads: bool, drop_caption: bool) -> list[Segment]:
    """The segments of a document as an epoch has them. What is not a pair (one image, one text) stays as it is."""
    if sorted(kind for kind, _ in segments) != [TEXT, IMAGE]:
        return segments
    image, text = sorted(segments, key=lambda segment: segment[0] == TEXT)
    if drop_caption:
        return [image]
    return [text, image] if text_leads else [image, text]


def to_tokens(segments: list[Segment], vocabulary: Vocabulary, eos_id: int) -> NDArray[np.int64]:
    """The token ids of a document: text as it is, [IMG] codes [/IMG] for an image, EOS at the end."""
    pieces: list[IntArray | list[int]] = []
    for kind, ids in segments:
        if kind == TEXT:
            pieces.append(ids)
        else:
            pieces += [[vocabulary.image_start], ids + np.int64(vocabulary.code_offset), [vocabulary.image_end]]
    return np.concatenate([*pieces, [eos_id]])


def full_lengths(shard: IdShard) -> NDArray[np.int64]:
    """Tokens of each document of a shard with its caption."""
    owner = np.repeat(np.arange(len(shard)), np.diff(shard.segment_starts))
    images = np.bincount(owner, weights=shard.segment_kinds == IMAGE, minlength=len(shard)).astype(np.int64)
    return np.diff(shard.id_starts) + 2 * images + 1
