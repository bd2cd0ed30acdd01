"""Settings of `data_prep/pretokenize.py`."""

from __future__ import annotations

from typing import Literal

from lavit_dist.config.base import Seed, config
from lavit_dist.config.images import MAX_PIXELS
from lavit_dist.config.ray import RayConfig
from lavit_dist.errors import check


@config
class PretokenizeConfig:
    """Which pairs become ids, by which tokenizers, and how the work is cut."""

    run_dir: str
    """Folder of the id set: one folder per split, each with shards and a manifest."""
    pairs: str
    """Folder of a pair set: its splits train/ and heldout/ are done, those that are there; tars directly in it count as train."""
    tokenizer: str
    """Folder that holds visual_tokenizer/, the frozen visual tokenizer."""
    text_tokenizer: str
    """Folder of a Hugging Face tokenizer."""
    seed: Seed = 0
    """Seed of the selection noise, which depends on it and on each pair's key alone."""
    selection: Literal["gumbel", "argmax"] = "gumbel"
    """How patches are chosen: a Gumbel sample, as the released code does at inference too, or the more probable choice."""
    inputs_per_shard: int = 16
    """Tars that make one id shard: 16 tars of 10,000 pairs give about 40 MB."""
    batch_size: int = 64
    """Images in one forward pass."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What matrices are multiplied in. bf16 is faster and gives other ids to a few tokens, so ids of either are another set."""
    compile: bool = False
    """Let torch.compile fuse the blocks of tower and merger, which costs each process a minute at its start and needs a C++ compiler."""
    max_pixels: int = MAX_PIXELS
    """Largest picture that is decoded, pixels (Pillow's own limit); larger ones are quarantined."""
    verify_inputs: bool = True
    """Whether the tars of finished shards are hashed again before the shards are passed over; names and sizes always are compared."""
    ray: RayConfig = RayConfig()

    def validate(self) -> None:
        for name in ("inputs_per_shard", "batch_size", "max_pixels"):
            check(getattr(self, name) > 0, f"{name} {getattr(self, name)} must be at least 1.")
