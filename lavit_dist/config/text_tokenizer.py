"""Settings of `data_prep/train_text_tokenizer.py`."""

from __future__ import annotations

from lavit_dist.config.base import config
from lavit_dist.errors import check

BYTES_AND_SPECIALS = 258
"""The smallest vocabulary: 256 bytes, <eos> and <pad>."""


@config
class TrainTextTokenizerConfig:
    """A byte-level BPE for data sets whose language is too small for LLaMA's 32,000 ids."""

    run_dir: str
    """Folder of the tokenizer; it holds tokenizer.json when the run is done."""
    pairs: str
    """Folder of a pair set; the captions of its split train/ are used, or of tars directly in it."""
    vocab_size: int = 32_000
    """Most ids that the tokenizer may have; captions with few different words give fewer."""
    lower_case: bool = True
    """Whether text is lower-cased: right for captions, whose capitals mark sentences and nothing else."""

    def validate(self) -> None:
        check(
            self.vocab_size >= BYTES_AND_SPECIALS,
            f"vocab_size {self.vocab_size} must be at least {BYTES_AND_SPECIALS}: 256 bytes and two special ids.",
        )
