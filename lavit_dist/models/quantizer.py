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
    """[token, dim], unit length; the gradient passes straight through to the input."""
    codes: Tensor
    """[token], int64, 0 .. size - 1."""
    chosen: Tensor
    """[token, dim], the codes' vectors, with a gradient where the codebook learns by one."""


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of codes that were hit `counts` [code] times; the number of codes if all were hit alike."""
    return float(torch.special.entr(counts / counts.sum()).sum().exp())


class VectorQuantizer(nn.Module):
    """Nearest code by cosine. The codebook follows moving averages (`update`), or gradients where its weight requires them."""

    hits: Tensor

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__()
        self.config = config
        # Drawn and normalised so that on the meta device, where models are made that are to be read, torch's compiler isn't loaded.
        self.embedding = nn.Embedding.from_pretrained(torch.randn(config.size, config.dim), freeze=True)
        if not self.embedding.weight.is_meta:
            self.normalise()
        self.register_buffer("hits", torch.zeros(config.size), persistent=False)
        """Moving average of hits per step, [code]; training state, kept by checkpoints but not part of the released file."""

    def forward(self, unit: Tensor) -> Quantized:
        """`unit` [token, dim] are unit vectors in fp32, any number of them."""
        codes = self.assign(unit.detach())
        chosen = self.embedding(codes)
        return Quantized(unit + (chosen - unit).detach(), codes, chosen)

    @torch.no_grad()
    def normalise(self) -> None:
        """Brings the codes back to unit length, after which nearest by cosine and nearest by distance are the same."""
        self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))

    def assign(self, unit: Tensor) -> Tensor:
        """Codes [vector] nearest to unit vectors [vector, dim]: arg-min of |z|^2 + |c|^2 - 2 z c, as released."""
        with torch.autocast(unit.device.type, enabled=False):
            codebook = self.embedding.weight
            lengths = codebook.square().sum(-1)
            return torch.cat([(lengths - 2 * part @ codebook.t()).argmin(-1) for part in unit.split(VECTORS_AT_A_TIME)])

    def statistics(self, unit: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Hits [code] and sums of unit vectors [code, dim] by the code they have; sums over ranks of both are what `update` takes."""
        counts = torch.bincount(codes, minlength=self.config.size).to(unit.dtype)
        sums = torch.zeros_like(self.embedding.weight).index_add_(0, codes, unit)
        return counts, sums

    @torch.no_grad()
    def update(self, counts: Tensor, sums: Tensor) -> Tensor:
        """Moves hit codes towards the mean of their vectors, unless gradients do, and returns the dead codes [dead].

        Every rank must pass the same tensors.
        """
        decay = self.config.decay
        codebook = self.embedding.weight
        if self.config.learning == "ema":
            hit = (counts > 0)[:, None]
            moved = decay * codebook + (1 - decay) * F.normalize(sums, dim=-1)
            codebook.copy_(F.normalize(torch.where(hit, moved, codebook), dim=-1))
        if not self.hits.any():  # nothing was counted before: a loaded codebook, whose rarer codes are not dead for that
            self.hits.fill_(float(counts.mean()))
        self.hits.mul_(decay).add_(counts, alpha=1 - decay)
        return (self.hits < self.config.revive_below * self.hits.mean()).nonzero().flatten()

    @torch.no_grad()
    def revive(self, dead: Tensor, candidates: Tensor) -> int:
        """Puts the first of the dead codes [dead] onto `candidates` [candidate, dim]; returns how many it could serve."""
        dead = dead[: len(candidates)]
        self.embedding.weight[dead] = F.normalize(candidates[: len(dead)], dim=-1)
        self.hits[dead] = self.hits.mean()
        return len(dead)

    @torch.no_grad()
    def initialise(self, unit: Tensor, generator: torch.Generator, batches: float = 1, iterations: int = 10) -> None:
        """Sets the codebook to the spherical k-means centres of unit vectors [vector, dim], those of `batches` steps."""
        centres, counts = spherical_kmeans(unit, self.config.size, generator, iterations)
        self.embedding.weight.copy_(centres)
        self.hits.copy_(counts / batches)


def spherical_kmeans(unit: Tensor, num_centres: int, generator: torch.Generator, iterations: int) -> tuple[Tensor, Tensor]:
    """Centres [centre, dim] of unit vectors [vector, dim], and the vectors in each [centre]; empty centres are re-drawn.

    With fewer vectors than centres, the rest are jittered copies. `generator` draws on the CPU, wherever the vectors are.
    """

    def jitter(vectors: Tensor) -> Tensor:
        return vectors + 0.05 * torch.randn(vectors.shape, generator=generator).to(vectors)

    draw = torch.randperm(len(unit), generator=generator).to(unit.device)
    repeats = -(-num_centres // len(unit))
    centres = unit[draw.repeat(repeats)[:num_centres]].clone()
    if repeats > 1:
        centres[len(unit) :] = jitter(centres[len(unit) :])
    counts = torch.zeros(num_centres)
    for _ in range(iterations):
        directions = F.normalize(centres, dim=-1).t()
        assigned = torch.cat([(part @ directions).argmax(-1) for part in unit.split(VECTORS_AT_A_TIME)])
        counts = torch.bincount(assigned, minlength=num_centres).to(unit.dtype)
        sums = torch.zeros_like(centres).index_add_(0, assigned, unit)
        empty = (counts == 0).nonzero().flatten()
        centres = torch.where(counts[:, None] > 0, sums, centres)
        centres[empty] = jitter(unit[torch.randint(len(unit), (len(empty),), generator=generator).to(unit.device)])
    return F.normalize(centres, dim=-1), counts
