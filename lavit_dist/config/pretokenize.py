"""Settings of `data_prep/pretokenize.py`."""

from __future__ import annotations

from lavit_dist.config.base import config
from lavit_dist.config.image_job import ImageJobConfig


@config
class PretokenizeConfig(ImageJobConfig):
    """Which pairs become ids, by which tokenizers, and how the work is cut."""

    text_tokenizer: str
    """Folder of a Hugging Face tokenizer."""
