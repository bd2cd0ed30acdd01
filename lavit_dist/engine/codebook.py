"""How the codebook learns on all ranks alike: k-means at first, moving averages, and dead codes brought back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lavit_dist.data.hashing import stable_hash
from lavit_dist.models.quantizer import VectorQuantizer, perplexity
from lavit_dist.parallel.distributed import gather_rows, rank, world_size


class TokenVectors(NamedTuple):
    """What an image's tokens were before quantization."""

    position: int
    """The image's place in the global batch."""
    unit: Tensor
    """Unit vectors [token, dim]."""


class CodebookLearner:
    """Collects the vectors of a step's images, moves the codebook once per step, and knows which codes are in use.

    Nothing depends on how a global batch is shared out to ranks and micro-batches: sums are taken over all of them, and what is drawn at
    random is drawn by the images' places in the batch.
    """

    def __init__(self, quantizer: VectorQuantizer, *, seed: int, usage_window: int) -> None:
        self.quantizer = quantizer
        self.seed = seed
        self.usage_window = usage_window
        size = quantizer.config.size
        self.last_hit = torch.full((size,), -usage_window, dtype=torch.int64, device=quantizer.hits.device)
        """Step at which each code was last hit [code]."""
        self.clear()

    def clear(self) -> None:
        """Forgets what was collected since the last update."""
        self.images: list[TokenVectors] = []
        self.counts = torch.zeros_like(self.quantizer.hits)
        self.sums = torch.zeros_like(self.quantizer.embedding.weight)

    @torch.no_grad()
    def collect(self, positions: Sequence[int], lengths: Sequence[int], unit: Tensor, codes: Tensor) -> None:
        """Takes in the images at `positions` of the global batch: unit vectors [token, dim] and codes [token], image after image."""
        counts, sums = self.quantizer.statistics(unit, codes)
        self.counts += counts
        self.sums += sums
        self.images += [TokenVectors(*of_image) for of_image in zip(positions, unit.split(list(lengths)), strict=True)]

    @torch.no_grad()
    def update(self, step: int, *, learn: bool) -> dict[str, float]:
        """Moves the codebook by what was collected, unless it doesn't `learn`, and returns the figures of its use. Collective."""
        if world_size() > 1:
            dist.all_reduce(self.counts)
            dist.all_reduce(self.sums)
        counts = self.counts
        self.last_hit[counts > 0] = step
        revived = 0
        if learn:
            if self.quantizer.config.learning == "gradient":
                self.quantizer.normalise()  # after the optimizer moved it
            dead = self.quantizer.update(counts, self.sums)
            if len(dead):
                revived = self.quantizer.revive(dead, self._candidates(step, len(dead)))
        self.clear()
        return {
            "perplexity": perplexity(counts),
            "codes_used": (self.last_hit > step - self.usage_window).float().mean().item(),
            "codes_revived": float(revived),
        }

    @torch.no_grad()
    def initialise(self, images: Sequence[TokenVectors], *, batches: int) -> None:
        """Sets the codebook by k-means over the vectors of `batches` global batches, of which each rank brings its images. Collective."""
        ordered = _by_position(images)
        if rank() == 0:
            self.quantizer.initialise(ordered, torch.Generator().manual_seed(self.seed), batches)
        if world_size() > 1:
            dist.broadcast(self.quantizer.embedding.weight, 0)
            dist.broadcast(self.quantizer.hits, 0)

    def state_dict(self) -> dict[str, Any]:
        """The statistics; the codes themselves are saved with the model."""
        return {"hits": self.quantizer.hits, "last_hit": self.last_hit}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.quantizer.hits.copy_(state["hits"])
        self.last_hit.copy_(state["last_hit"])

    def _candidates(self, step: int, count: int) -> Tensor:
        """Up to `count` of the step's vectors [candidate, dim], drawn from all ranks' tokens alike whatever their number."""
        draws = [
            torch.rand(
                len(image.unit),
                dtype=torch.float64,
                generator=torch.Generator().manual_seed(_seed(self.seed, step, image.position)),
            )
            for image in self.images
        ]
        draw = torch.cat(draws).to(self.sums.device)
        unit = torch.cat([image.unit for image in self.images])
        order = draw.argsort()[:count]
        drawn = gather_rows(torch.cat([draw[order, None], unit[order].double()], dim=-1))
        return drawn[drawn[:, 0].argsort()[:count], 1:].to(self.sums)


def _seed(seed: int, step: int, position: int) -> int:
    return stable_hash("revival", seed, step, position) >> 1


def _by_position(images: Sequence[TokenVectors]) -> Tensor:
    """The vectors of all ranks' images [token, dim] in the order of the images' places."""
    unit = torch.cat([image.unit for image in images])
    places = torch.tensor([image.position for image in images], device=unit.device, dtype=torch.float64)
    lengths = torch.tensor([len(image.unit) for image in images], device=unit.device)
    rows = gather_rows(torch.cat([places.repeat_interleave(lengths)[:, None], unit.double()], dim=-1))
    return rows[rows[:, 0].argsort(stable=True), 1:].to(unit.dtype)
