"""What the benchmarks of the language model train on: random documents of LaVIT's lengths, packed as in training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from packing import lavit_lengths

from lavit_dist.data.global_batches import GlobalBatches
from lavit_dist.data.micro_batch import MicroBatch, lay_out
from lavit_dist.models.vocabulary import Vocabulary

LAVIT = Vocabulary(text_size=32_000, codebook_size=16_384)
EOS_ID = 2
CODES_SHARE = 0.8
"""Of a document's tokens (90 codes of 112)."""
DRAWN = 40
"""Documents that are drawn per row; about 18 fill it."""


class LavitBatches(GlobalBatches):
    """The same global batch in every step, without any file."""

    def __init__(self, global_batch_size: int, seq_len: int, vocabulary: Vocabulary = LAVIT, seed: int = 0) -> None:
        self.global_batch_size, self.seq_len = global_batch_size, seq_len
        self.rows: Any = SimpleNamespace(vocabulary=vocabulary, eos_id=EOS_ID)
        rng = np.random.default_rng(seed)
        self.row_documents: list[list[NDArray[np.int64]]] = [[] for _ in range(global_batch_size)]
        room = np.full(global_batch_size, seq_len)
        # First fit of a random stream: a row has documents of all lengths, as a batch of documents that nobody packs would.
        for length in lavit_lengths(DRAWN * global_batch_size * seq_len // 2048, seed):
            fits = np.flatnonzero(room >= length)
            if len(fits):
                room[fits[0]] -= length
                self.row_documents[fits[0]].append(self._document(rng, int(length)))

    @property
    def documents(self) -> list[NDArray[np.int64]]:
        """All documents of the global batch."""
        return [document for row in self.row_documents for document in row]

    @property
    def tokens(self) -> int:
        """Tokens of the global batch, padding not counted."""
        return sum(map(len, self.documents))

    @property
    def supervised(self) -> int:
        """Tokens that have a label: all but the last of each document."""
        return self.tokens - len(self.documents)

    def micro_batches(self, step: int, data_rank: int, data_size: int, micro_batch_size: int) -> list[MicroBatch]:
        mine = self.row_documents[data_rank::data_size]
        return [
            lay_out(
                mine[start : start + micro_batch_size],
                vocabulary=self.rows.vocabulary,
                eos_id=EOS_ID,
                seq_len=self.seq_len,
                weight=1.0 / self.supervised,
            )
            for start in range(0, len(mine), micro_batch_size)
        ]

    def shares_consumed(self, step: int) -> dict[str, float]:
        return {}

    def _document(self, rng: np.random.Generator, length: int) -> NDArray[np.int64]:
        """[IMG] codes [/IMG] caption EOS."""
        vocabulary = self.rows.vocabulary
        num_codes = int((length - 3) * CODES_SHARE)
        codes = vocabulary.code_offset + rng.integers(0, vocabulary.codebook_size, num_codes)
        caption = rng.integers(EOS_ID + 1, vocabulary.text_size, length - 3 - num_codes)
        return np.concatenate([[vocabulary.image_start], codes, [vocabulary.image_end], caption, [EOS_ID]]).astype(np.int64)
