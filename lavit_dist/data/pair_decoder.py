"""From samples of a tar to pixels and text ids: what a CPU does before a visual tokenizer. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lavit_dist.config.filter import FilterRule
from lavit_dist.data.filtering import SIZE_COLUMNS, image_columns, refusing_rule
from lavit_dist.data.pairs import read_pair
from lavit_dist.data.picture import decode_image, open_picture, perceptual_hash, squash
from lavit_dist.data.quarantine import Quarantined, SampleError
from lavit_dist.data.tar_reader import FileLocation, RawSample, read_from
from lavit_dist.data.text_tokenizer import TextTokenizer

STAGE = "pretokenize"


@dataclass(frozen=True)
class CaptionedImage:
    """What documents are made of, but for the codes of the image."""

    key: str
    captions: tuple[str, ...]
    text_ids: tuple[bytes, ...] | None
    """Of each caption, int32; None where captions are not encoded. Not arrays: those would keep the shared memory that they came in, with all the pixels, from being freed."""
    location: FileLocation
    scores: dict[str, float]
    """Numbers of the pair's .json."""
    image_hash: int
    """`perceptual_hash`."""


@dataclass(frozen=True)
class DecodedPairs:
    """What became of some samples; each is in one of the three."""

    pixels: NDArray[np.uint8]
    """[pair, 3, size, size]."""
    pairs: list[CaptionedImage]
    quarantined: list[Quarantined]
    filtered: list[str]
    """The rule that each sample which isn't wanted fell to."""

    @classmethod
    def of(
        cls,
        decoded: Sequence[tuple[CaptionedImage, NDArray[np.uint8]]],
        image_size: int,
        quarantined: Sequence[Quarantined] = (),
        filtered: Sequence[str] = (),
    ) -> DecodedPairs:
        """Joins the pixels, [3, size, size] each."""
        pixels = np.stack([pixels for _, pixels in decoded]) if decoded else np.empty((0, 3, image_size, image_size), np.uint8)
        return cls(pixels, [pair for pair, _ in decoded], list(quarantined), list(filtered))

    @classmethod
    def joined(cls, parts: Sequence[DecodedPairs]) -> DecodedPairs:
        """Several as one, in order; at least one."""
        return cls(
            np.concatenate([part.pixels for part in parts]),
            [pair for part in parts for pair in part.pairs],
            [record for part in parts for record in part.quarantined],
            [rule for part in parts for rule in part.filtered],
        )


class PairDecoder:
    """Reads captions, decodes and squashes pictures, encodes text. What a sample becomes depends on the sample alone."""

    def __init__(self, text_tokenizer: str | None, image_size: int, max_pixels: int, rules: Mapping[str, FilterRule]) -> None:
        """`text_tokenizer` is the folder of one, which is read when the first sample comes; without one captions are not encoded.

        `rules` are by the columns they look at.
        """
        self.text_tokenizer, self.image_size, self.max_pixels = text_tokenizer, image_size, max_pixels
        self.rules = {column: rule for column, rule in rules.items() if column not in SIZE_COLUMNS}
        self.size_rules = {column: rule for column, rule in rules.items() if column in SIZE_COLUMNS}
        self._text: TextTokenizer | None = None

    def decode(self, tar: str, samples: Sequence[RawSample]) -> DecodedPairs:
        """Decodes `samples` out of the tar at the path `tar`. Raises `OSError` when the tar can't be read."""
        decoded: list[tuple[CaptionedImage, NDArray[np.uint8]]] = []
        quarantined: list[Quarantined] = []
        filtered: list[str] = []
        with Path(tar).open("rb") as file:
            for sample in samples:
                try:
                    outcome = self._decode(file, sample)
                except SampleError as error:
                    quarantined.append(Quarantined.of(sample.key, STAGE, error))
                    continue
                if isinstance(outcome, str):
                    filtered.append(outcome)
                else:
                    decoded.append(outcome)
        return DecodedPairs.of(decoded, self.image_size, quarantined, filtered)

    def _decode(self, file: BinaryIO, sample: RawSample) -> tuple[CaptionedImage, NDArray[np.uint8]] | str:
        """The pair and its pixels, or the rule that leaves it out."""
        pair = read_pair(file, sample)
        rule = refusing_rule(self.rules, pair.metadata)
        if rule is not None:
            return rule
        data = read_from(file, pair.image_location)
        if self.size_rules:
            rule = refusing_rule(self.size_rules, image_columns(*open_picture(data, self.max_pixels).size))
            if rule is not None:
                return rule
        picture = decode_image(data, self.max_pixels)
        text_ids, scores = self._encode(pair.captions), _scores(pair.metadata)
        captioned = CaptionedImage(pair.key, pair.captions, text_ids, pair.image_location, scores, perceptual_hash(picture))
        return captioned, squash(picture, self.image_size)

    def _encode(self, captions: Sequence[str]) -> tuple[bytes, ...] | None:
        if self.text_tokenizer is None:
            return None
        if self._text is None:
            self._text = TextTokenizer.load(self.text_tokenizer)
        return tuple(np.asarray(self._text.encode(caption), np.int32).tobytes() for caption in captions)


def _scores(metadata: dict[str, Any]) -> dict[str, float]:
    """The numbers at the top level of a pair's metadata."""
    return {name: value for name, value in metadata.items() if isinstance(value, int | float) and not isinstance(value, bool)}
