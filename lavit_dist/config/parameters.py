"""How a language model's parameters begin and move apart from one another."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat

from lavit_dist.config.base import config

NewRows = Literal["normal", "mean_noise", "projected"]
"""Where the rows of [IMG], [/IMG] and codes begin: normal with model.init_std, spread as the text rows are, or projected codes."""


@config
class LearningRateScales:
    """Factors of optimizer.learning_rate."""

    new_rows: PositiveFloat = 1.0
    """Rows of [IMG], [/IMG] and the codes, in embedding and head."""
    embeddings: PositiveFloat = 1.0
    """Rows of text, in embedding and head."""
    body: PositiveFloat = 1.0
    """Decoder blocks and the final norm."""


@config
class ParametersConfig:
    """What of the language model is trained, and how fast beside the rest."""

    learning_rate_scale: LearningRateScales = LearningRateScales()
    freeze: tuple[str, ...] = ()
    """Patterns (as of file names) of Hugging Face names that stay as they are, such as `model.layers.*`; new rows are named
    `model.embed_tokens.new_rows` and `lm_head.new_rows`."""
    decay_embeddings: bool = True
    """Whether weight decay applies to embedding and head, as to other matrices."""
