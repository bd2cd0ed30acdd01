"""Documents as the language model sees them: which order, with or without the caption, how long, and their tokens.

What is chosen for a document is a hash of (seed, epoch, document), so it doesn't depend on what else is read, or where.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lavit_dist.data.id_shard import IMAGE, TEXT, IdShardHead
from lavit_dist.data.order import CAPTION_DROPOUT, ORIENTATION, UInt64Array, fractions
from lavit_dist.models.vocabulary import Vocabulary

IntArray = NDArray[np.integer]
Segment = tuple[int, IntArray]


@dataclass(frozen=True)
class DocumentTable:
    """What packing needs to know of every document: no payload is read for it."""

    hashes: UInt64Array
    """`document_hash` of each document."""
    full_lengths: NDArray[np.int64]
    """Tokens with the caption: segments, [IMG] and [/IMG] around each image, EOS."""
    short_lengths: NDArray[np.int64]
    """Tokens without the caption; equal to `full_lengths` for what is not a pair and so never loses its text."""
    shard_starts: NDArray[np.int64]
    """Shard i holds documents `shard_starts[i]` to `shard_starts[i + 1]`."""

    @classmethod
    def of(cls, shards: Iterable[IdShardHead]) -> DocumentTable:
        """The table of the documents in `shards`, in that order; it goes over them once and keeps none open."""
        columns = [(shard.document_hash.copy(), *_lengths(shard)) for shard in shards]
        return cls(
            hashes=np.concatenate([hashes for hashes, _, _ in columns]),
            full_lengths=np.concatenate([full for _, full, _ in columns]),
            short_lengths=np.concatenate([short for _, _, short in columns]),
            shard_starts=np.cumsum([0, *(len(hashes) for hashes, _, _ in columns)]),
        )

    def lengths(self, documents: IntArray, seed: int, epoch: int, caption_dropout: float) -> NDArray[np.int64]:
        """Tokens of `documents` in an epoch."""
        dropped = caption_dropped(self.hashes[documents], seed, epoch, caption_dropout)
        return np.where(dropped, self.short_lengths[documents], self.full_lengths[documents])


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


def _lengths(shard: IdShardHead) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens of each document with and without its caption."""
    segments = np.diff(shard.segment_starts)
    owner = np.repeat(np.arange(len(shard)), segments)
    image_of = shard.segment_kinds == IMAGE
    images = np.bincount(owner, weights=image_of, minlength=len(shard)).astype(np.int64)
    text_ids = np.bincount(owner, weights=shard.segment_lengths * ~image_of, minlength=len(shard)).astype(np.int64)
    ids = np.bincount(owner, weights=shard.segment_lengths, minlength=len(shard)).astype(np.int64)
    full = ids + 2 * images + 1
    pair = (segments == 2) & (images == 1)
    return full, full - text_ids * pair
