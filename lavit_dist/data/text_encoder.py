"""From the rows of a text corpus to documents of ids, and what became of each row."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lavit_dist.data.corpus_rows import CorpusRow
from lavit_dist.data.id_shard import TEXT, IdDocument, Outcomes
from lavit_dist.data.quarantine import Quarantined, SampleError, count_reasons
from lavit_dist.data.text_tokenizer import TextTokenizer

STAGE = "tokenize_text"
BATCH = 256
"""Texts that are handed to the tokenizer at a time: its threads share them."""


@dataclass
class EncodedText:
    """What became of some rows: each is a document, quarantined, or filtered."""

    rows: int = 0
    documents: list[IdDocument] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)
    filtered: Counter[str] = field(default_factory=Counter)

    @property
    def outcomes(self) -> Outcomes:
        """The counts."""
        return Outcomes(self.rows, count_reasons(self.quarantined), dict(sorted(self.filtered.items())))

    def refuse(self, row: CorpusRow, error: SampleError) -> None:
        """Quarantines a row."""
        self.quarantined.append(Quarantined.of(row.key, STAGE, error))


class TextEncoder:
    """Encodes texts, each alone: what a row becomes depends on the row and the settings."""

    def __init__(self, tokenizer: TextTokenizer, *, min_characters: int = 0, max_characters: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.min_characters, self.max_characters = min_characters, max_characters

    def encode(self, rows: Sequence[CorpusRow]) -> EncodedText:
        """Makes each usable row a document of one text.

        Adds to the reasons of `read_rows`: `not_tokenizable` (the tokenizer raises, or gives no ids). Filters by `too_few_characters` and
        `too_many_characters`.
        """
        encoded = EncodedText(len(rows))
        for batch in _batches(self._wanted(rows, encoded)):
            for (row, _), ids in zip(batch, self._ids([text for _, text in batch]), strict=True):
                if isinstance(ids, SampleError):
                    encoded.refuse(row, ids)
                else:
                    source = row.file, row.number, row.size
                    encoded.documents.append(IdDocument(row.key, 0, [(TEXT, ids)], keep_mask=b"", caption="", source=source))
        return encoded

    def _wanted(self, rows: Sequence[CorpusRow], encoded: EncodedText) -> Iterator[tuple[CorpusRow, str]]:
        for row in rows:
            if isinstance(row.text, SampleError):
                encoded.refuse(row, row.text)
            elif len(row.text) < self.min_characters:
                encoded.filtered["too_few_characters"] += 1
            elif self.max_characters is not None and len(row.text) > self.max_characters:
                encoded.filtered["too_many_characters"] += 1
            else:
                yield row, row.text

    def _ids(self, texts: Sequence[str]) -> list[NDArray[np.uint32] | SampleError]:
        try:
            return [_checked(ids) for ids in self.tokenizer.encode_batch(texts)]
        except Exception as error:  # the tokenizers library raises nothing narrower
            if len(texts) == 1:
                return [SampleError("not_tokenizable", " ".join(str(error).split())[:500], texts[0].encode())]
            return [self._ids([text])[0] for text in texts]


def _checked(ids: Sequence[int]) -> NDArray[np.uint32] | SampleError:
    """Ids in little memory."""
    return np.array(ids, np.uint32) if ids else SampleError("not_tokenizable", "the tokenizer makes no ids of the text")


def _batches(wanted: Iterator[tuple[CorpusRow, str]]) -> Iterator[list[tuple[CorpusRow, str]]]:
    while batch := list(itertools.islice(wanted, BATCH)):
        yield batch
