"""The training rows of the language model."""

from __future__ import annotations

from lavit_dist.config.base import config
from lavit_dist.errors import check


@config
class RowsConfig:
    """Which ids are trained on, and how they are packed."""

    ids: str
    """Folder of one split of an id set, such as IDS/train; it holds manifest.json."""
    text_tokenizer: str
    """Folder of the Hugging Face tokenizer that the ids were made with."""
    seq_len: int = 2048
    """Tokens in a row; a longer document is left out, never cut."""
    caption_dropout: float = 0.1
    """Share of pairs that lose their caption in an epoch, for classifier-free guidance (10 % is usual)."""

    def validate(self) -> None:
        check(self.seq_len >= 2, f"seq_len {self.seq_len} must be at least 2: a token and the one after it.")
        check(0 <= self.caption_dropout <= 1, f"caption_dropout {self.caption_dropout} is a share; it must lie between 0 and 1.")
