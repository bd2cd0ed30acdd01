"""The vector quantizer: a codebook of unit vectors that follows moving averages (Eq. 3, `quantize.*`; after BEiT-2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavit_dist.config.model import CodebookConfig

VECTORS_AT_A_TIME = 256
"""Vectors whose distances to all codes are held at a time: 16 MiB at 16,384 codes, which caches hold."""


class Quantized(NamedTuple):
    """Codes of a set of vectors."""

    vectors: Tensor
    """[vector, dim], unit length; the gradient passes straight through to the input."""
    codes: Tensor
    """[vector], int64, 0 .. size - 1."""
    unit: Tensor
    """[vector, dim], the l2-normalised input; its values make the codebook's averages, its gradient a commitment term."""


class VectorQuantizer(nn.Module):
    """Nearest code by cosine. The codebook is moved by `update`, never by a gradient."""

    hits: Tensor

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.size, config.dim)
        self.embedding.weight.requires_grad_(False)
        self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))
        self.register_buffer("hits", torch.zeros(config.size), persistent=False)
        """Moving average of hits per step, [code]; training state, kept by checkpoints but not part of the released file."""

    def forward(self, vectors: Tensor) -> Quantized:
        """`vectors` [vector, dim] of any length; distances are taken in fp32."""
        unit = F.normalize(vectors.float(), dim=-1)
        codes = self.assign(unit)
        chosen = self.embedding(codes)
        return Quantized(unit + (chosen - unit).detach(), codes, unit)

    def assign(self, unit: Tensor) -> Tensor:
        """Codes [vector] nearest to unit vectors [vector, dim]: arg-min of |z|^2 + |c|^2 - 2 z c, as released."""
        codebook = self.embedding.weight
        lengths = codebook.square().sum(-1)
        return torch.cat([(lengths - 2 * part @ codebook.t()).argmin(-1) for part in unit.split(VECTORS_AT_A_TIME)])

    def statistics(self, quantized: Quantized) -> tuple[Tensor, Tensor]:
        """Hits [code] and sums of assigned unit vectors [code, dim]; sums over ranks of both are what `update` takes."""
        counts = torch.bincount(quantized.codes, minlength=self.config.size).to(quantized.unit.dtype)
        sums = torch.zeros_like(self.embedding.weight).index_add_(0, quantized.codes, quantized.unit)
        return counts, sums

    @torch.no_grad()
    def update(self, counts: Tensor, sums: Tensor, candidates: Tensor) -> int:
        """Moves hit codes towards the mean of their vectors and dead codes onto `candidates` [candidate, dim].

        Returns how many codes were revived. Every rank must pass the same tensors.
        """
        decay = self.config.decay
        codebook = self.embedding.weight
        means = F.normalize(sums, dim=-1)
        hit = (counts > 0)[:, None]
        codebook.copy_(F.normalize(torch.where(hit, decay * codebook + (1 - decay) * means, codebook), dim=-1))
        self.hits.mul_(decay).add_(counts, alpha=1 - decay)
        dead = (self.hits < self.config.revive_below).nonzero().flatten()[: len(candidates)]
        codebook[dead] = F.normalize(candidates[: len(dead)], dim=-1)
        self.hits[dead] = self.hits.mean().clamp_min(self.config.revive_below)
        return len(dead)

    @torch.no_grad()
    def initialise(self, vectors: Tensor, generator: torch.Generator, iterations: int = 10, batches: float = 1) -> None:
        """Sets the codebook to the spherical k-means centres of `vectors` [vector, dim], those of `batches` steps."""
        centres, counts = spherical_kmeans(F.normalize(vectors.float(), dim=-1), self.config.size, generator, iterations)
        self.embedding.weight.copy_(centres)
        self.hits.copy_(counts / batches)


def spherical_kmeans(unit: Tensor, num_centres: int, generator: torch.Generator, iterations: int) -> tuple[Tensor, Tensor]:
    """Centres [centre, dim] of unit vectors [vector, dim], and the vectors in each [centre]; empty centres are re-drawn.

    With fewer vectors than centres, the rest are jittered copies.
    """
    draw = torch.randperm(len(unit), generator=generator)
    repeats = -(-num_centres // len(unit))
    centres = unit[draw.repeat(repeats)[:num_centres]].clone()
    if repeats > 1:
        centres[len(unit) :] += 0.05 * torch.randn(centres[len(unit) :].shape, generator=generator)
    counts = torch.zeros(num_centres)
    for _ in range(iterations):
        assigned = (unit @ F.normalize(centres, dim=-1).t()).argmax(-1)
        counts = torch.bincount(assigned, minlength=num_centres).to(unit.dtype)
        sums = torch.zeros_like(centres).index_add_(0, assigned, unit)
        empty = (counts == 0).nonzero().flatten()
        centres = torch.where(counts[:, None] > 0, sums, centres)
        spare = unit[torch.randint(len(unit), (len(empty),), generator=generator)]
        centres[empty] = spare + 0.05 * torch.randn(spare.shape, generator=generator)
    return F.normalize(centres, dim=-1), counts
