"""A judge of pictures: it names an image's attributes from the features of a frozen vision tower.

It is trained on real images and asked about generated ones; how often it is right on real images that it hasn't seen belongs beside
every score that it gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 64
"""Channels of the grid that the probe works on."""
QUERIES = 4
"""Learned queries that pool the grid."""
DROPOUT = 0.1
STEPS = 500
BATCH_SIZE = 32
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05


class AttentionProbe(nn.Module):
    """A small network over the grid of patch features: a convolution, attention pooling, one linear classifier per attribute."""

    def __init__(self, width: int, num_patches: int, classes: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.classes = {name: tuple(values) for name, values in classes.items()}
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, CHANNELS)
        self.grid = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)  # a shape spans several patches
        self.positions = nn.Parameter(torch.zeros(num_patches, CHANNELS))
        self.queries = nn.Parameter(torch.randn(QUERIES, CHANNELS) * CHANNELS**-0.5)
        self.key = nn.Linear(CHANNELS, CHANNELS)
        self.value = nn.Linear(CHANNELS, CHANNELS)
        self.dropout = nn.Dropout(DROPOUT)
        self.heads = nn.ModuleDict({name: nn.Linear(QUERIES * CHANNELS, len(values)) for name, values in self.classes.items()})

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Logits [image, class] per attribute, of features [image, patch, width]."""
        side = math.isqrt(features.shape[1])
        x = self.dropout(self.project(self.norm(features))).transpose(1, 2).unflatten(-1, (side, side))
        x = (x + F.gelu(self.grid(x))).flatten(2).transpose(1, 2)
        queries = self.queries.expand(len(x), -1, -1)
        pooled = F.scaled_dot_product_attention(queries, self.key(x + self.positions), F.gelu(self.value(x))).flatten(1)
        return {name: head(self.dropout(pooled)) for name, head in self.heads.items()}

    @torch.inference_mode()
    def name(self, features: Tensor) -> list[dict[str, str]]:
        """The most probable value of every attribute, per image."""
        best = {name: logits.argmax(-1).tolist() for name, logits in self(features).items()}
        return [{name: self.classes[name][best[name][index]] for name in self.classes} for index in range(len(features))]


def train_probe(features: Tensor, truth: Sequence[Mapping[str, str]], seed: int, steps: int = STEPS) -> AttentionProbe:
    """A probe of two attributes, which `truth` gives for each image of `features` [image, patch, width].

    Where some combinations of the two never occur (they are held out), an ordinary classifier learns that they can't, and misjudges
    just those. So an image's values of one attribute compete only with those that occur together with its value of the other.
    """
    classes = {name: sorted({attributes[name] for attributes in truth}) for name in truth[0]}
    targets = {
        name: torch.tensor([values.index(attributes[name]) for attributes in truth], device=features.device)
        for name, values in classes.items()
    }
    first, second = classes
    together = torch.zeros(len(classes[first]), len(classes[second]), dtype=torch.bool, device=features.device)
    together[targets[first], targets[second]] = True
    rivals = {first: together.t()[targets[second]], second: together[targets[first]]}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        probe = AttentionProbe(features.shape[-1], features.shape[1], classes).to(features.device)
        optimizer = torch.optim.AdamW(probe.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
        for _ in range(steps):
            chosen = torch.randint(len(features), (BATCH_SIZE,), device=features.device)
            logits = probe(features[chosen])
            losses = [
                F.cross_entropy(logits[name].masked_fill(~rivals[name][chosen], -torch.inf), targets[name][chosen])
                for name in classes
            ]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
            schedule.step()
    return probe.eval().requires_grad_(False)


def shares_right(named: Sequence[Mapping[str, str]], truth: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """The share of images whose attribute is named right, per attribute, and under `all` that of images with every one right."""
    return {name: _share(named, truth, lambda a, b, name=name: a[name] == b[name]) for name in truth[0]} | {
        "all": _share(named, truth, lambda a, b: all(a[name] == b[name] for name in b))
    }


def _share(named: Sequence[Mapping[str, str]], truth: Sequence[Mapping[str, str]], right: Callable[..., bool]) -> float:
    return sum(right(a, b) for a, b in zip(named, truth, strict=True)) / len(truth)
