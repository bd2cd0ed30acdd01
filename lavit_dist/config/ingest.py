"""Settings of `data_prep/ingest.py`."""

from __future__ import annotations

from lavit_dist.config.base import Seed, config
from lavit_dist.config.images import MAX_PIXELS, check_max_pixels
from lavit_dist.errors import check


@config
class IngestConfig:
    """Where the pictures and captions are, and how they are packed into tars."""

    source: str
    """A folder of pictures with .txt captions beside them, or with a captions file in it, or of tars; or a .csv, .tsv or .jsonl file."""
    run_dir: str
    """Folder of the set: train/, heldout/, config.yaml, summary.json."""
    seed: Seed = 0
    """Decides which pairs are held out."""
    image_column: str | None = None
    """Column of a captions file with the picture's path, relative to the file; by default image, image_path, file_name or path."""
    image_root: str | None = None
    """Folder that the pictures of a captions file lie beneath, by default the file's own; rows that name others are quarantined, so that
    a captions file from elsewhere can't make files of this machine part of a data set."""
    caption_column: str | None = None
    """Column with the caption, or in JSONL a list of them; by default captions, caption or text."""
    key_column: str | None = None
    """Column with a name for the pair; by default key where there is one, else the picture's file name."""
    heldout_fraction: float = 0.05
    """Share of the pairs that goes to the held-out split, chosen by a hash of the key; above 0 it is at least one pair."""
    samples_per_shard: int = 1000
    """Pairs in one tar: the unit of work of the offline jobs."""
    max_side: int | None = None
    """Pictures with a longer side than this, in pixels, are shrunk and saved as JPEG; by default all files are kept as they are."""
    max_pixels: int = MAX_PIXELS
    """Pictures with more pixels than this are quarantined as bombs; the default is Pillow's `MAX_IMAGE_PIXELS`."""
    num_threads: int = 4
    """Pictures that are read and checked at a time."""

    def validate(self) -> None:
        for name in ("samples_per_shard", "num_threads"):
            check(getattr(self, name) > 0, f"{name} {getattr(self, name)} must be at least 1.")
        check_max_pixels(self.max_pixels)
        check(
            self.max_side is None or self.max_side >= 16,
            f"max_side {self.max_side} must be at least 16 pixels; leave it out to keep all.",
        )
        check(
            0 <= self.heldout_fraction <= 0.5,
            f"heldout_fraction {self.heldout_fraction} must lie between 0 and 0.5; most pairs are for training.",
        )
