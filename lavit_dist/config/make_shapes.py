"""Settings of `data_prep/make_shapes.py`."""

from __future__ import annotations

from typing import Literal

from lavit_dist.config.base import Seed, config
from lavit_dist.errors import check


@config
class MakeShapesConfig:
    """The procedural set: how much of it, how large, and what is held out."""

    run_dir: str
    """Folder of the set: train/, heldout/, config.yaml, summary.json."""
    seed: Seed = 0
    """Decides every scene, and which combinations are held out."""
    train_samples: int = 6000
    """Scenes of the training split."""
    heldout_samples: int = 500
    """Scenes of the held-out split."""
    image_size: int = 64
    """Height and width of a picture, pixels."""
    max_objects: int = 4
    """Most objects in a scene: the main one and up to three small ones."""
    held_out_attributes: tuple[Literal["colour", "shape", "position", "texture", "tint"], ...] = ("colour", "shape")
    """Attributes of the main object (and its background) whose combinations are held out; each value alone stays in training."""
    held_out_fraction: float = 1 / 6
    """Share of the combinations that is held out: 5 of the 32 pairs of colour and shape. 0 holds none out."""
    samples_per_shard: int = 1000
    """Pairs in one tar: the unit of work of the offline jobs."""

    def validate(self) -> None:
        for name in ("train_samples", "heldout_samples", "samples_per_shard"):
            check(getattr(self, name) > 0, f"{name} {getattr(self, name)} must be at least 1.")
        check(32 <= self.image_size <= 1024, f"image_size {self.image_size} must lie between 32 and 1024 pixels.")
        check(
            1 <= self.max_objects <= 4, f"max_objects {self.max_objects} must lie between 1 and 4, as many as a scene has room for."
        )
        names = self.held_out_attributes
        check(
            len(names) >= 2 and len(set(names)) == len(names),
            f"held_out_attributes [{', '.join(names)}] must name at least two different attributes; a single one held out"
            " would never be seen in training.",
        )
        check(
            0 <= self.held_out_fraction <= 0.5,
            f"held_out_fraction {self.held_out_fraction} must lie between 0 and 0.5, so that every value stays common in training.",
        )
