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


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs of one tar with the codes and packed keep mask of each image."""

    tar: str
    """Its name."""
    pairs: list[CaptionedImage]
    codes: list[bytes]
    """Of each image, int32."""
    keep_masks: list[bytes]

    def documents(self) -> Iterator[IdDocument]:
        """One per caption, in order; those of an image share its codes."""
        for pair, codes, keep_mask in zip(self.pairs, self.codes, self.keep_masks, strict=True):
            for index, (caption, ids) in enumerate(zip(pair.captions, pair.text_ids, strict=True)):
                yield IdDocument(
                    key=pair.key,
                    caption_index=index,
                    segments=((IMAGE, _ids(codes)), (TEXT, _ids(ids))),
                    keep_mask=keep_mask,
                    caption=caption,
                    source=(self.tar, pair.location.offset, pair.location.size),
                    scores=pair.scores,
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
        documents = [document for number in range(parts) for document in found[number].documents()]
        batch = to_batch(documents, self.encoding)
        return commit_batch(folder, name, batch, encoding=self.encoding, inputs=inputs, outcomes=outcomes, quarantined=quarantined)

    def forget(self, shard: str) -> None:
        """Lets go of the parts of a shard."""
        self._parts.pop(shard, None)


def _ids(data: bytes) -> list[int]:
    ids: list[int] = np.frombuffer(data, np.int32).tolist()
    return ids
