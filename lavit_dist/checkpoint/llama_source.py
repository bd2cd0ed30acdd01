"""Initial weights of a run from a Hugging Face LLaMA folder, in the place of random ones.

Every rank reads what its layers ask for and nothing else; a text model's missing rows for [IMG], [/IMG] and codes are made here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from lavit_dist.checkpoint.llama_folder import LAVIT, LlamaFolder
from lavit_dist.checkpoint.official import load_codebook
from lavit_dist.config.model import LlamaConfig
from lavit_dist.config.parameters import NewRows
from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.errors import check
from lavit_dist.models.llama import EMBEDDING, HEAD, NEW_EMBEDDING, NEW_HEAD, initial_weight
from lavit_dist.models.new_rows import RowStatistics, mean_noise_rows, projected_rows, row_statistics
from lavit_dist.models.vocabulary import Vocabulary

logger = logging.getLogger(__name__)
STATISTICS_ROWS = 1024
"""Rows of a table that are in memory at a time while their statistics are taken."""
TABLE_OF_NEW_ROWS = {NEW_EMBEDDING: EMBEDDING, NEW_HEAD: HEAD}


def llama_source(config: PretrainConfig, vocabulary: Vocabulary, digest: str | None) -> LlamaSource | None:
    """What `config.init_from` gives a run over ids of the visual tokenizer `digest`, if they have images; None without it."""
    if config.init_from is None:
        return None
    folder = LlamaFolder(config.init_from)
    if config.new_rows is not None and folder.vocabulary:
        logger.warning(
            "new_rows %s is ignored: init_from %s is an export, whose visual rows are read", config.new_rows, folder.path
        )
    return LlamaSource(
        folder,
        config.model,
        vocabulary,
        new_rows=config.new_rows or ("projected" if config.visual_tokenizer else "normal"),
        visual_tokenizer=config.visual_tokenizer,
        digest=digest,
        seed=config.seed,
    )


class LlamaSource:
    """A function from Hugging Face name and shape to the whole fp32 weight, as `llama_layers` takes it."""

    def __init__(
        self,
        folder: LlamaFolder,
        model: LlamaConfig,
        vocabulary: Vocabulary,
        *,
        new_rows: NewRows = "normal",
        visual_tokenizer: str | Path | None = None,
        digest: str | None = None,
        seed: int = 0,
    ) -> None:
        """`visual_tokenizer` is the folder that new rows may be projected from, `digest` is that of the one that made the run's ids.

        Raises `UserError` unless `folder` holds `model`, and at least the text rows of `vocabulary`.
        """
        folder.check_model(model)
        self.folder = folder
        self.model = model
        self.vocabulary = vocabulary
        self.new_rows = new_rows
        self.visual_tokenizer = visual_tokenizer
        self.seed = seed
        self._check_vocabulary(digest)

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name in TABLE_OF_NEW_ROWS:
            weight = self._new_rows(name, (shape[0], shape[1]))
        elif name in (EMBEDDING, HEAD):
            weight = self.folder.read(name, 0, self.vocabulary.text_size)
        else:
            weight = self.folder.read(name)
        if tuple(weight.shape) != tuple(shape):
            raise AssertionError(f"{name}: {tuple(weight.shape)} read for {tuple(shape)}")
        return weight.float()

    def _new_rows(self, name: str, shape: tuple[int, int]) -> Tensor:
        table, words = TABLE_OF_NEW_ROWS[name], self.vocabulary
        if self.folder.vocabulary:
            return self.folder.read(table, words.text_size, words.size)
        if self.new_rows == "normal":
            return initial_weight(self.model, name, shape, self.seed)
        text = self._text_statistics(table)
        if self.new_rows == "mean_noise" or self.visual_tokenizer is None:
            return mean_noise_rows(self.model, name, shape, text, self.seed)
        return projected_rows(self.model, name, shape, text, load_codebook(self.visual_tokenizer), self.seed)

    def _text_statistics(self, table: str) -> RowStatistics:
        def parts() -> Iterator[Tensor]:
            size = self.vocabulary.text_size
            for first in range(0, size, STATISTICS_ROWS):
                yield self.folder.read(table, first, min(first + STATISTICS_ROWS, size))

        return row_statistics(parts())

    def _check_vocabulary(self, digest: str | None) -> None:
        ours, theirs, path = self.vocabulary, self.folder.vocabulary, self.folder.path
        if theirs:
            trained_with = (self.folder.lavit or {}).get("visual_tokenizer_digest", digest)
            check(
                digest is None or digest == trained_with,
                f"init_from {path} was trained on codes of the visual tokenizer {str(trained_with)[:16]}, but the ids are of"
                f" {str(digest)[:16]}; give ids of the same, or remove {path / LAVIT} to take its text rows alone.",
            )
            check(
                theirs == ours and self.folder.rows >= theirs.size,
                f"init_from {path} has {theirs.text_size} text ids and {theirs.codebook_size} codes in {self.folder.rows} rows, but this"
                f" run has {ours.text_size} and {ours.codebook_size}; give ids of the same tokenizers, or remove {path / LAVIT} to take"
                " its text rows alone.",
            )
            return
        check(
            self.folder.rows >= ours.text_size,
            f"init_from {path} has {self.folder.rows} rows, fewer than the {ours.text_size} ids of the text tokenizer; give the"
            " tokenizer that the model was trained with.",
        )
        if self.folder.rows > ours.text_size:
            logger.warning(
                "%s has %d rows, the text tokenizer %d ids: the rows after those (padding, as a rule) are left out",
                path,
                self.folder.rows,
                ours.text_size,
            )
