"""Settings that jobs share which run a frozen visual tokenizer over tars of pairs, spread over Ray actors."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from lavit_dist.config.base import Seed, config
from lavit_dist.config.filter import FilterRule
from lavit_dist.config.images import MAX_PIXELS, check_max_pixels
from lavit_dist.config.ray import DecodingRayConfig
from lavit_dist.errors import check


@config
class ImageJobConfig:
    """Which pairs are used, by which tokenizer, and how the work is cut."""

    run_dir: str
    """Folder of the job: its settings and how it went; and of the id set, if `output` names no other."""
    pairs: str | tuple[str, ...]
    """A pair set: a folder, on disk or a URL, of which the splits train/ and heldout/ are done, those that are there, while tars directly
    in it count as train. Or tars of train: patterns such as `s3://bucket/{00000..41455}.tar`, or a list of all these."""
    output: str | None = None
    """Folder or URL of the id set: one folder per split, each with shards and a manifest. None: `run_dir`."""
    tokenizer: str
    """Folder that holds visual_tokenizer/, the frozen visual tokenizer."""
    seed: Seed = 0
    """Seed of the selection noise, which depends on it and on each pair's key alone."""
    selection: Literal["gumbel", "argmax"] = "gumbel"
    """How patches are chosen: a Gumbel sample, as the released code does at inference too, or the more probable choice."""
    inputs_per_shard: int = 16
    """Tars that make one id shard: 16 tars of 10,000 pairs give about 70 MB."""
    batch_size: int = 64
    """Images in one forward pass."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What matrices are multiplied in. bf16 is faster and gives other ids to a few tokens, so ids of either are another set."""
    compile: bool = False
    """Let torch.compile fuse the blocks of tower and merger, which costs each process a minute at its start and needs a C++ compiler."""
    max_pixels: int = MAX_PIXELS
    """Largest picture that is decoded, pixels (Pillow's own limit); larger ones are quarantined."""
    filter: dict[str, FilterRule] = field(default_factory=dict)
    """Which pairs are wanted: rules by the column of the .json that they look at, such as `similarity: {min: 0.3}`, or image_width,
    image_height, image_shorter_side, image_aspect_ratio of the picture itself. The rest are counted and left out."""
    verify_inputs: bool = False
    """Whether the local tars of finished shards are hashed again before the shards are passed over: that reads them all. Names and sizes
    always are compared."""
    storage_options: dict[str, str | int | float | bool | None] = field(default_factory=dict)
    """What fsspec needs to reach the stores of `pairs` and `output`, such as `endpoint_url`. Secrets are better left to the environment,
    where stores find them; those that are given are used, but never written down."""
    fetch_attempts: int = 5
    """How often a tar of a store is asked for before its shard fails; the waits between double."""
    cache_folder: str | None = None
    """Folder on each node for tars of stores while they are read: six or so per actor. None: the system's folder of temporary files."""
    report_seconds: float = 10.0
    """Seconds between two reports of how far the job is."""
    ray: DecodingRayConfig = DecodingRayConfig()

    def validate(self) -> None:
        for name in ("inputs_per_shard", "batch_size", "fetch_attempts"):
            check(getattr(self, name) > 0, f"{name} {getattr(self, name)} must be at least 1.")
        check_max_pixels(self.max_pixels)
        for column, rule in self.filter.items():
            rule.check_as(f"filter.{column}")
        check(self.report_seconds > 0, f"report_seconds {self.report_seconds} must be above 0.")
