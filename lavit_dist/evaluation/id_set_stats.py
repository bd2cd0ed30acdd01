"""What is in an id set: counts, lengths, how often each code is used. Shards are looked at one at a time."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lavit_dist.config.id_cache import IdCacheConfig
from lavit_dist.data.documents import full_lengths
from lavit_dist.data.id_shard import IMAGE, TEXT, IdShard
from lavit_dist.data.id_shards import IdShards
from lavit_dist.data.manifest import Manifest
from lavit_dist.evaluation.tokenizer_health import code_use
from lavit_dist.observe.job_progress import read_throughput

PERCENTILES = (5, 25, 50, 75, 95, 99)
Histogram = NDArray[np.int64]
"""How often each whole number from 0 occurs, [number]."""


@dataclass(frozen=True)
class IdSetStats:
    """Sums over a set. An image counts once, however many captions, and so documents, it has."""

    manifest: Manifest
    text_lengths: Histogram
    """Ids of each text, over all documents."""
    image_lengths: Histogram
    """Codes of each image."""
    document_lengths: Histogram
    """Tokens of each document as the language model sees it: with its caption, [IMG], [/IMG] and EOS."""
    document_codes: int
    """Codes over all documents, those of an image as often as it has captions."""
    code_counts: Histogram
    """How often each code is used, over images."""
    images_per_second: float | None
    """Of the whole job that made the set; None where it left no record."""

    @property
    def zipf_exponent(self) -> float | None:
        """See `fit_zipf`."""
        return fit_zipf(self.code_counts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        shards = self.manifest.shards
        documents = sum(shard.documents for shard in shards)
        size = sum(shard.size for shard in shards)
        text, document = (_sum(lengths) for lengths in (self.text_lengths, self.document_lengths))
        values: dict[str, Any] = {
            "location": str(self.manifest.folder),
            "fingerprint": self.manifest.fingerprint,
            "shards": len(shards),
            "documents": documents,
            "images": sum(shard.images for shard in shards),
            "bytes": size,
            "bytes_per_document": size / documents,
            "tokens": {"text": text, "image": self.document_codes, "marks": document - text - self.document_codes, "all": document},
            "outcomes": _outcomes(self.manifest),
            "lengths": {
                "text": describe_lengths(self.text_lengths),
                "image": describe_lengths(self.image_lengths),
                "document": describe_lengths(self.document_lengths),
            },
        }
        if self.code_counts.any():
            values["codes"] = _describe_codes(self.code_counts)
        if self.images_per_second is not None:
            values["images_per_second"] = self.images_per_second
        return values


def gather_stats(manifest: Manifest, cache: IdCacheConfig) -> IdSetStats:
    """Looks at every shard by memory map; what grows is the longest length. Raises `UserError` for a shard that can't be had."""
    lengths: dict[str, Histogram] = {name: np.zeros(1, np.int64) for name in ("text", "image", "document")}
    code_counts = np.zeros(manifest.encoding.codebook_size, np.int64)
    document_codes = 0
    for shard in IdShards(manifest, cache, max_open=1):
        of_images = np.repeat(first_of_image(shard), np.diff(shard.segment_starts)) & (shard.segment_kinds == IMAGE)
        code_counts += np.bincount(shard.ids[np.repeat(of_images, shard.segment_lengths)], minlength=len(code_counts))
        document_codes += int(shard.segment_lengths[shard.segment_kinds == IMAGE].sum(dtype=np.int64))
        for name, found in (
            ("text", shard.segment_lengths[shard.segment_kinds == TEXT]),
            ("image", shard.segment_lengths[of_images]),
            ("document", full_lengths(shard)),
        ):
            lengths[name] = _add(lengths[name], found)
    return IdSetStats(
        manifest=manifest,
        text_lengths=lengths["text"],
        image_lengths=lengths["image"],
        document_lengths=lengths["document"],
        document_codes=document_codes,
        code_counts=code_counts,
        images_per_second=read_throughput(manifest, cache.storage_options),
    )


def first_of_image(shard: IdShard) -> NDArray[np.bool_]:
    """Which documents are the first of their shard that have their image."""
    tars, offsets = shard.source
    has_image = np.flatnonzero(shard.per_document(shard.segment_kinds == IMAGE))
    _, firsts = np.unique(np.stack([tars, offsets], axis=1)[has_image], axis=0, return_index=True)
    first = np.zeros(len(shard), np.bool_)
    first[has_image[firsts]] = True
    return first


def describe_lengths(histogram: Histogram) -> dict[str, Any]:
    """Number, mean, extremes and percentiles of lengths, and the histogram itself; percentiles are lengths that occur."""
    number = int(histogram.sum())
    if number == 0:
        return {"number": 0}
    below = np.cumsum(histogram)
    percentiles = {f"p{share}": int(np.searchsorted(below, share / 100 * number)) for share in PERCENTILES}
    occurring = np.flatnonzero(histogram)
    extremes = {"min": int(occurring[0]), "max": int(occurring[-1])}
    return {"number": number, "mean": _sum(histogram) / number, **extremes, **percentiles, "histogram": histogram.tolist()}


def fit_zipf(counts: Histogram) -> float | None:
    """The exponent s of frequency ~ rank^-s, by least squares of logarithms over the codes in use; None for fewer than two.

    Ranks weigh 1 / rank, so that each decade of ranks counts alike and the many rare codes don't decide alone.
    """
    ordered = np.sort(counts[counts > 0])[::-1]
    if len(ordered) < 2:
        return None
    ranks = np.arange(1, len(ordered) + 1)
    slope, _ = np.polyfit(np.log(ranks), np.log(ordered), 1, w=ranks**-0.5)
    return -float(slope)


def _describe_codes(counts: Histogram) -> dict[str, Any]:
    share, perplexity = code_use(counts)
    return {
        "codebook_size": len(counts),
        "in_use": int((counts > 0).sum()),
        "share_in_use": share,
        "perplexity": perplexity,
        "entropy_bits": math.log2(perplexity),
        "zipf_exponent": fit_zipf(counts),
        "counts": counts.tolist(),
    }


def _outcomes(manifest: Manifest) -> dict[str, Any]:
    """What became of samples and inputs, over all shards."""
    kinds = ("quarantined", "filtered", "damaged_inputs")
    totals: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    for shard in manifest.shards:
        for kind in kinds:
            totals[kind].update(getattr(shard.outcomes, kind))
    return {
        "samples": sum(shard.outcomes.samples for shard in manifest.shards),
        "used": sum(shard.outcomes.used for shard in manifest.shards),
        **{kind: dict(sorted(counts.items())) for kind, counts in totals.items()},
    }


def _add(histogram: Histogram, numbers: NDArray[Any]) -> Histogram:
    """`histogram` with `numbers` counted as well; it grows to the largest of them."""
    found = np.bincount(numbers, minlength=len(histogram))
    found[: len(histogram)] += histogram
    return found


def _sum(histogram: Histogram) -> int:
    """The sum of the numbers that a histogram counts."""
    return int(np.arange(len(histogram)) @ histogram)
