"""One vocabulary for text and pictures: text ids, [IMG], [/IMG], then the visual codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

PADDED_MULTIPLE = 128
"""Sharded tables have a multiple of this many rows, so that every tensor-parallel degree that divides it shares them out evenly."""


class Table(NamedTuple):
    """Consecutive ids whose rows are one parameter of the embedding, and one of the head."""

    name: str
    """`text`, or `visual`: [IMG], [/IMG] and the codes, which a language model that comes from elsewhere lacks."""
    first_id: int
    size: int
    """Number of ids."""

    @property
    def padded_size(self) -> int:
        """Rows that tensor-parallel ranks share out; those from `size` on mean nothing and are never read or trained."""
        return -(-self.size // PADDED_MULTIPLE) * PADDED_MULTIPLE


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
    def tables(self) -> tuple[Table, Table]:
        """The two parts whose rows are parameters of their own, so that each can have its own start and learning rate."""
        return Table("text", 0, self.text_size), Table("visual", self.text_size, self.codebook_size + 2)
