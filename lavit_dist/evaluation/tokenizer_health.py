"""Whether a visual tokenizer does what it should: keeps a third, spends more on busier images, and uses its codes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lavit_dist.data.id_shard import IMAGE
from lavit_dist.data.id_shards import IdShards
from lavit_dist.data.manifest import load_manifest
from lavit_dist.errors import check


class IdStatistics:
    """Tokens of each image of an id set, and how often it uses each code."""

    def __init__(self, folder: str | Path) -> None:
        """Raises `UserError` for a set without images."""
        manifest = load_manifest(folder)
        check(manifest.encoding.has_images, f"The id set {folder} holds text alone; give one of pairs.")
        self.tokens: dict[str, int] = {}
        """Tokens per image, by the key of its pair."""
        self.code_counts: NDArray[np.int64] = np.zeros(manifest.encoding.codebook_size, np.int64)
        for shard in IdShards(manifest):
            for document, key in enumerate(shard.column("key")):
                if key not in self.tokens:  # each caption of an image is a document that holds its codes again
                    codes = next(ids for kind, ids in shard.segments(document) if kind == IMAGE)
                    self.tokens[key] = len(codes)
                    self.code_counts += np.bincount(codes, minlength=len(self.code_counts))


def describe_tokens(statistics: IdStatistics, num_patches: int) -> dict[str, Any]:
    """Images, their mean keep ratio, and how many images have 0, 1, … `num_patches` tokens."""
    tokens = np.array(list(statistics.tokens.values()))
    return {
        "images": len(tokens),
        "keep_ratio": float(tokens.mean() / num_patches),
        "tokens_mean": float(tokens.mean()),
        "tokens_std": float(tokens.std()),
        "histogram": np.bincount(tokens, minlength=num_patches + 1).tolist(),
    }


def describe_codes(statistics: IdStatistics) -> dict[str, Any]:
    """The share of codes used at least once, their perplexity, and the count of each."""
    used, perplexity = code_use(statistics.code_counts)
    return {"used": used, "perplexity": perplexity, "counts": statistics.code_counts.tolist()}


def code_use(counts: NDArray[np.int64]) -> tuple[float, float]:
    """The share of codes used at least once, and their perplexity, from how often each is used [code]."""
    shares = counts / counts.sum()
    used = shares[shares > 0]
    return float(len(used) / len(shares)), float(np.exp(-(used * np.log(used)).sum()))


def tokens_follow_objects(tokens: Mapping[str, int], objects: Mapping[str, int]) -> float:
    """Spearman's rank correlation between an image's tokens and its number of objects, over the keys that both have."""
    keys = [key for key in tokens if key in objects]
    return spearman([tokens[key] for key in keys], [objects[key] for key in keys])


def tokens_by_objects(tokens: Mapping[str, int], objects: Mapping[str, int], num_patches: int) -> dict[int, list[int]]:
    """Per number of objects, how many images have 0, 1, … `num_patches` tokens, over the keys that both have."""
    groups: dict[int, list[int]] = {}
    for key in tokens.keys() & objects.keys():
        groups.setdefault(objects[key], []).append(tokens[key])
    return {number: np.bincount(groups[number], minlength=num_patches + 1).tolist() for number in sorted(groups)}


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation; ties share the mean of their ranks. 0 when one side doesn't vary."""
    ranks = np.stack([_ranks(np.asarray(values)) for values in (first, second)])
    if (ranks.std(1) == 0).any():
        return 0.0
    centred = (ranks - ranks.mean(1, keepdims=True)) / ranks.std(1, keepdims=True)
    return float((centred[0] * centred[1]).mean())


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]
