"""Which patches of a set of pictures got which code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lavit_dist.evaluation.tokenizer_health import code_use


class CodeUsage:
    """Fills up batch by batch; pictures are numbered from 0 in the order in which they come."""

    def __init__(self, codebook_size: int, width: int) -> None:
        self.codebook_size = codebook_size
        self.tokens: list[int] = []
        """Tokens of each picture."""
        self.features = torch.zeros(codebook_size, width)
        """Sum of the unit features of each code's patches."""
        self._codes: list[Tensor] = []
        self._patches: list[Tensor] = []

    def add(self, codes: Sequence[Tensor], keep_mask: Tensor, features: Tensor) -> None:
        """Takes a batch's codes [token] per picture, its keep mask and its features [picture, patch, width]."""
        unit = F.normalize(features[keep_mask].float(), dim=-1).cpu()
        self.features.index_add_(0, torch.cat(list(codes)).cpu(), unit)
        self.tokens += [len(of_picture) for of_picture in codes]
        self._codes += [of_picture.cpu() for of_picture in codes]
        self._patches += [mask.nonzero().flatten() for mask in keep_mask.cpu()]

    @property
    def counts(self) -> Tensor:
        """How often each code occurs, [code]."""
        return torch.bincount(torch.cat(self._codes), minlength=self.codebook_size)

    def use(self) -> tuple[float, float]:
        """The share of codes that occur, and their perplexity."""
        return code_use(self.counts.numpy())

    def likeness(self) -> Tensor:
        """Mean cosine of the features of each code's patches to their mean, [code]: 1 where all look alike to the tower."""
        return self.features.norm(dim=-1) / self.counts.clamp_min(1)

    def likeness_of_all(self) -> float:
        """The same over all kept patches: what a code without a meaning would have."""
        return float(self.features.sum(0).norm() / sum(self.tokens))

    def most_widespread(self, number: int) -> list[int]:
        """The codes that occur in most pictures, at most `number`; of those in equally many, the one that occurs more often is first."""
        pictures, counts = self.pictures, self.counts
        ordered = sorted(counts.nonzero().flatten().tolist(), key=lambda code: (-int(pictures[code]), -int(counts[code]), code))
        return ordered[:number]

    @property
    def pictures(self) -> Tensor:
        """In how many pictures each code occurs, [code]."""
        return torch.bincount(torch.cat([of_picture.unique() for of_picture in self._codes]), minlength=self.codebook_size)

    def different(self) -> float:
        """How many different codes a picture has, on average."""
        return float(self.pictures.sum()) / len(self._codes)

    def places(self, code: int, number: int) -> list[tuple[int, int]]:
        """(picture, patch) of at most `number` patches with `code`: one of each picture, then a second of each, and so on."""
        found: list[tuple[int, int, int]] = []
        for picture, (codes, patches) in enumerate(zip(self._codes, self._patches, strict=True)):
            here = patches[codes == code].tolist()
            found += [(turn, picture, patch) for turn, patch in enumerate(here)]
        return [(picture, patch) for _, picture, patch in sorted(found)[:number]]
