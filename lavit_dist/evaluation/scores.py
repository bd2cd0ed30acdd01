"""Scores of procedural scenes, which say what is in the image.

captions            shares right of {colour, shape, all (both), position, count}, and how many captions state the last two
text_to_image       what the judge sees in the drawn pictures: shares right of {colour, shape, all}
reconstruction      the same for the painted reconstructions
single              the three above of one attempt each, where those are of the best of several
probe               the judge itself, on real held-out images
features            the judge on the tokenizer's reconstructed features, before anything is painted
tokens_and_objects  Spearman's rank correlation of an image's tokens and its number of objects
tokens_by_objects   per number of objects, how many images have 0, 1, … tokens
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from lavit_dist.data.image import preprocess
from lavit_dist.data.pair_batches import PairDataset
from lavit_dist.data.pairs import PairSample
from lavit_dist.evaluation.captions import main_objects_right, score_captions
from lavit_dist.evaluation.probe import AttentionProbe, shares_right, train_probe
from lavit_dist.evaluation.tokenizer_health import IdStatistics, tokens_by_objects, tokens_follow_objects

JUDGED = ("colour", "shape")
Entries = Mapping[str, Sequence[dict[str, Any]]]


@dataclass(frozen=True)
class Attempt:
    """What the models made of the first held-out pairs."""

    captions: Sequence[str]
    drawn: Sequence[Image.Image]
    """A picture per first caption of a pair."""
    repainted: Sequence[Image.Image]
    """A picture per image's codes."""


@dataclass(frozen=True)
class Judge:
    """Says what is in a picture by the tower's features of it."""

    probe: AttentionProbe
    encode: Callable[[Sequence[Tensor]], Tensor]
    """From pixels [3, H, W] of images to features [image, patch, width]."""
    image_size: int
    """Height and width that `encode` takes, pixels."""

    @classmethod
    def train(
        cls,
        encode: Callable[[Sequence[Tensor]], Tensor],
        features: Tensor,
        samples: Sequence[PairSample],
        image_size: int,
        seed: int,
    ) -> Judge:
        """A judge that has learned from real images' features."""
        return cls(train_probe(features, [_main_object(sample) for sample in samples], seed), encode, image_size)

    def score(self, attempt: Attempt, samples: Sequence[PairSample], entries: Entries | None = None) -> dict[str, Any]:
        """Scores of captions, drawn pictures and reconstructions; with `entries` also its verdict in each of them."""
        entries = entries or {}
        scenes = [sample.metadata for sample in samples[: len(attempt.captions)]]
        verdicts = main_objects_right(attempt.captions, scenes)["all"]
        for entry, right in zip(entries.get("captions", ()), verdicts, strict=False):
            entry["right"] = right
        return {
            "captions": score_captions(attempt.captions, scenes),
            "text_to_image": self._of_pictures(attempt.drawn, samples, entries.get("text_to_image", ())),
            "reconstruction": self._of_pictures(attempt.repainted, samples, entries.get("reconstruction", ())),
        }

    def of_features(
        self, features: Tensor, samples: Sequence[PairSample], entries: Sequence[dict[str, Any]] = ()
    ) -> dict[str, float]:
        """Shares right of features [image, patch, width] of the first samples, and in each entry what was seen."""
        seen, truth = self.probe.name(features), [_main_object(sample) for sample in samples[: len(features)]]
        for entry, in_picture, asked in zip(entries, seen, truth, strict=False):
            entry |= {"seen": in_picture, "right": in_picture == asked}
        return shares_right(seen, truth)

    def _of_pictures(
        self, pictures: Sequence[Image.Image], samples: Sequence[PairSample], entries: Sequence[dict[str, Any]]
    ) -> dict[str, float]:
        pixels = [preprocess(picture, self.image_size) for picture in pictures]
        return self.of_features(self.encode(pixels), samples, entries)


def scores_of_tokens(statistics: Mapping[str, IdStatistics], pairs: Mapping[str, PairDataset], num_patches: int) -> dict[str, Any]:
    """How the number of tokens follows the number of objects, over the images of all splits."""
    objects = {sample.key: len(sample.metadata["objects"]) for dataset in pairs.values() for sample in dataset.samples}
    tokens = {key: number for of_split in statistics.values() for key, number in of_split.tokens.items()}
    return {
        "tokens_and_objects": tokens_follow_objects(tokens, objects),
        "tokens_by_objects": tokens_by_objects(tokens, objects, num_patches),
    }


def has_truth(sample: PairSample) -> bool:
    """Whether the pair says what is in its image, as make_shapes does."""
    objects = sample.metadata.get("objects")
    return (
        isinstance(objects, list)
        and bool(objects)
        and all(isinstance(thing, dict) and set(JUDGED) <= thing.keys() for thing in objects)
    )


def _main_object(sample: PairSample) -> Mapping[str, str]:
    main = sample.metadata["objects"][0]
    return {name: main[name] for name in JUDGED}
