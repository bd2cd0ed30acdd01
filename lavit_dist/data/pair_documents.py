"""From what decoding and encoding made of pairs to documents, and from those to shards. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lavit_dist.data.id_folder import IdFolder
from lavit_dist.data.id_shard import IMAGE, TEXT, Encoding, IdDocument, InputFile, Outcomes, ShardRecord
from lavit_dist.data.id_shard_writer import commit_batch, to_batch
from lavit_dist.data.pair_decoder import CaptionedImage
from lavit_dist.data.quarantine import Quarantined

Segment = tuple[int, list[int]]


@dataclass(frozen=True)
class EncodedImage:
    """What models made of an image; bytes, for arrays would keep the shared memory that they came in from being freed."""

    codes: bytes
    """int32."""
    keep_mask: bytes
    """See `IdDocument`."""
    latents: bytes | None = None
    """float16, where the set has latents."""


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs of one tar with what became of their images."""

    tar: str
    """Its name."""
    pairs: list[CaptionedImage]
    images: list[EncodedImage]

    def documents(self, latent_shape: Sequence[int] | None = None) -> Iterator[IdDocument]:
        """One per caption, in order, all with the image's codes; where captions were not encoded, one of the image alone."""
        for pair, image in zip(self.pairs, self.images, strict=True):
            codes = (IMAGE, _ids(image.codes))
            latents = None
            if latent_shape is not None and image.latents is not None:
                latents = np.frombuffer(image.latents, np.float16).reshape(latent_shape)
            for index, segments in enumerate(_segments(codes, pair)):
                yield IdDocument(
                    key=pair.key,
                    caption_index=index,
                    segments=segments,
                    keep_mask=image.keep_mask,
                    caption=pair.captions[index],
                    source=(self.tar, pair.location.offset, pair.location.size),
                    scores=pair.scores,
                    image_hash=pair.image_hash,
                    latents=latents,
                )


class ShardWriter:
    """Gathers the parts of shards and writes each when it is whole."""

    def __init__(self, encoding: Encoding) -> None:
        self.encoding = encoding
        self._parts: dict[str, dict[int, EncodedPairs]] = {}

    def add(self, shard: str, number: int, part: EncodedPairs) -> None:
        """Takes part `number` of a shard, for which any name will do."""
        self._parts.setdefault(shard, {})[number] = part

    def commit(
        self,
        shard: str,
        parts: int,
        folder: IdFolder,
        name: str,
        inputs: Sequence[InputFile],
        outcomes: Outcomes,
        quarantined: Sequence[Quarantined],
    ) -> ShardRecord | list[int]:
        """Writes the quarantine file, the shard `name`, and last its sidecar.

        If this writer was started anew since and lacks some of the `parts`, it returns their numbers instead, to be added again.
        """
        found = self._parts.get(shard, {})
        missing = [number for number in range(parts) if number not in found]
        if missing:
            return missing
        shape = self.encoding.latents.shape if self.encoding.latents else None
        documents = [document for number in range(parts) for document in found[number].documents(shape)]
        batch = to_batch(documents, self.encoding)
        return commit_batch(folder, name, batch, encoding=self.encoding, inputs=inputs, outcomes=outcomes, quarantined=quarantined)

    def forget(self, shard: str) -> None:
        """Lets go of the parts of a shard."""
        self._parts.pop(shard, None)


def _segments(codes: Segment, pair: CaptionedImage) -> list[tuple[Segment, ...]]:
    if pair.text_ids is None:
        return [(codes,)]
    return [(codes, (TEXT, _ids(ids))) for ids in pair.text_ids]


def _ids(data: bytes) -> list[int]:
    ids: list[int] = np.frombuffer(data, np.int32).tolist()
    return ids
