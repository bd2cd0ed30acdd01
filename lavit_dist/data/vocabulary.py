"""One vocabulary for text and pictures: text ids, [IMG], [/IMG], then the visual codes."""

from __future__ import annotations

from dataclasses import dataclass

PADDED_MULTIPLE = 128
"""The embedding has a multiple of this many rows, so that every tensor-parallel degree up to it divides them evenly."""


@dataclass(frozen=True)
class Vocabulary:
    """Ids 0..T-1 are text, T is [IMG], T+1 is [/IMG], T+2+k is visual code k."""

    text_size: int
    """Number of text ids, T: 32,000 for LLaMA."""
    codebook_size: int
    """Number of visual codes, K: 16,384 in the released tokenizer."""

    @property
    def image_start(self) -> int:
        """The id of [IMG]."""
        return self.text_size

    @property
    def image_end(self) -> int:
        """The id of [/IMG]."""
        return self.text_size + 1

    @property
    def code_offset(self) -> int:
        """The id of visual code 0."""
        return self.text_size + 2

    @property
    def size(self) -> int:
        """Number of ids that mean something: 48,386 for LaVIT."""
        return self.code_offset + self.codebook_size

    @property
    def padded_size(self) -> int:
        """Rows of the embedding: 48,512 for LaVIT. Ids from `size` on are never an input, a label or a prediction."""
        return -(-self.size // PADDED_MULTIPLE) * PADDED_MULTIPLE
