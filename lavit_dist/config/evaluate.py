"""Settings of the evaluation of a trained LaVIT."""

from __future__ import annotations

from lavit_dist.config.base import config
from lavit_dist.config.generate import SamplingConfig
from lavit_dist.errors import check


@config
class EvaluateConfig(SamplingConfig):
    """Captions, draws and reconstructs held-out pairs, and scores what has a ground truth.

    `seed` should be pretokenize's: then an image gets the codes that the language model was trained on.
    """

    run_dir: str
    """Folder of the run; results.json and the pictures go there."""
    pairs: str
    """Folder of pairs with the splits train/ and heldout/."""
    ids: str
    """Folder of the id set made of them, with the same splits."""
    decoder: str
    """Folder of the trained pixel decoder and its tokenizer (train_decoder's RUN_DIR/model)."""
    language_model: str
    """Folder of the trained language model (pretrain's RUN_DIR/model)."""
    num_captions: int = 100
    """Held-out images to caption."""
    num_pictures: int = 64
    """Held-out prompts to draw, and held-out images to reconstruct."""
    num_probe_images: int = 3000
    """Training images, at most, that the probe learns from."""

    def validate(self) -> None:
        super().validate()
        for name in ("num_captions", "num_pictures", "num_probe_images"):
            check(getattr(self, name) >= 1, f"{name} {getattr(self, name)} must be at least 1.")
