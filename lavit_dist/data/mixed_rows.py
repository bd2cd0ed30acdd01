"""The rows of a run over one or several id sets, and the state that continues them: nothing in it depends on ranks."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lavit_dist.config.mixture import SOLE_SOURCE
from lavit_dist.data.kept_manifest import check_fingerprint
from lavit_dist.data.manifest import Manifest
from lavit_dist.data.mixture import MILLION, Asked, Phase, plan
from lavit_dist.data.rows import RowDataset
from lavit_dist.data.spans import Spans
from lavit_dist.errors import UserError, check

logger = logging.getLogger(__name__)
TEXT_ALIKE = ("text_tokenizer", "text_vocab_size")
"""What the sources of a run must have in common."""
IMAGES_ALIKE = ("visual_tokenizer", "codebook_size")
"""What those of them that have images must have in common."""


class MixedRows:
    """Row r of a run is a row of one of its sources, each of which is read in its own order, as if it were alone."""

    def __init__(
        self,
        sources: Mapping[str, RowDataset],
        asked: Sequence[Asked],
        max_epochs: Mapping[str, int] | None = None,
        total_rows: int | None = None,
    ) -> None:
        """A source with `max_epochs` drops out after them; `total_rows`, where known, saves counting rows that no run comes to.

        Raises `UserError` when the sources' ids were made with different tokenizers.
        """
        self.sources = dict(sources)
        self.asked = asked
        self.max_epochs = max_epochs or {}
        first = next(iter(sources.values()))
        self.vocabulary, self.eos_id, self.seq_len = first.vocabulary, first.eos_id, first.seq_len
        self.modality_weights = first.modality_weights
        manifests = [rows.manifest for rows in sources.values()]
        with_images = [manifest for manifest in manifests if manifest.encoding.has_images]
        self.encoding = (with_images or manifests)[0].encoding
        _check_alike(manifests, TEXT_ALIKE)
        _check_alike(with_images, IMAGES_ALIKE)
        limits = {name: self._limit(name, epochs, total_rows) for name, epochs in self.max_epochs.items()}
        self.limits = {name: limit for name, limit in limits.items() if limit is not None}
        self.mixture = plan(asked, self.limits)
        self._removed: dict[str, Any] = {}

    @classmethod
    def of(cls, rows: RowDataset) -> MixedRows:
        """The rows of one set, as they are."""
        return cls({SOLE_SOURCE: rows}, [Asked(0, {SOLE_SOURCE: 1.0})])

    def labels(self, row: int) -> tuple[int, int]:
        """Tokens of text and of images in a row that have a label."""
        source, index = self.mixture.locate(row)
        return self.sources[source].labels(index)

    def row_spans(self, row: int) -> Spans:
        """What a row holds, in order."""
        source, index = self.mixture.locate(row)
        return self.sources[source].row_spans(index)

    def row_tokens(self, row: int) -> list[NDArray[np.int64]]:
        """The tokens of each document of a row."""
        source, index = self.mixture.locate(row)
        return self.sources[source].row_tokens(index)

    def check_suffice(self, total_rows: int) -> None:
        """Raises `UserError` when the sources' `max_epochs` end before `total_rows`."""
        end = self.mixture.end
        if end is None or end >= total_rows:
            return
        sizes = [f"{name} {limit:,} with max_epochs {self.max_epochs[name]}" for name, limit in sorted(self.limits.items())]
        raise UserError(
            f"total_steps x global_batch_size asks for {total_rows:,} rows, but {end:,} are available before every source that has a weight"
            f" is used up ({', '.join(sizes)}); raise or leave out max_epochs of one of sources, give another a weight, or lower"
            " total_steps.",
        )

    def state(self, row: int) -> dict[str, Any]:
        """Where row `row` begins."""
        consumed = self.mixture.consumed(row)
        return {
            "sources": self._removed
            | {name: _source_state(rows, consumed.get(name, 0)) for name, rows in sorted(self.sources.items())},
            "phases": [
                {"first_row": phase.first_row, "rows_per_million": phase.shares}
                for phase in self.mixture.phases
                if phase.first_row < row
            ],
            "rows_consumed": row,
        }

    def check_state(self, state: Mapping[str, Any], kept: Path | None = None) -> None:
        """Raises `UserError` when a source holds other data or rows than those that a run with `state` trained on.

        It names the shards that differ where the folder `kept` has the manifests that the run was started with.
        """
        for name, saved in sorted(state["sources"].items()):
            if name in self.sources:
                rows = self.sources[name]
                check_fingerprint(saved["fingerprint"], rows.manifest, kept)
                check(
                    saved["plan_digest"] == rows.plan_digest,
                    f"The checkpoint's rows were packed from {rows.manifest.folder} with another seed, seq_len, caption_dropout,"
                    " documents.captions, documents.too_long or version of the packer; restore those settings, or start a new run.",
                )

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`: weights that are now others begin a phase there, and sources that are gone give no more rows.

        Raises `UserError` when a source holds other data or rows than those that were trained on.
        """
        saved, row = state["sources"], state["rows_consumed"]
        history = [Phase(part["first_row"], dict(sorted(part["rows_per_million"].items()))) for part in state["phases"]]
        mixture = plan(self.asked, self.limits, history, row)
        consumed = mixture.consumed(row)
        check(
            all(consumed.get(name, 0) == source["rows_consumed"] for name, source in saved.items()),
            "The checkpoint's rows were mixed in another order than this version of the program has; go on with the version that"
            " wrote it, or start a new run.",
        )
        self.check_state(state)
        self.mixture = mixture
        self._removed = {name: source for name, source in saved.items() if name not in self.sources}
        for name in sorted(self.sources.keys() - saved.keys()):
            logger.info("the source %s is new from row %d on", name, row)
        for name in sorted(self._removed.keys() & (history[-1].shares.keys() if history else set())):
            logger.info("the source %s is no longer read from row %d on", name, row)
        self.log_phases(row)

    def log_phases(self, row: int) -> None:
        """Tells the shares of each phase from `row` on; a phase that is under way there has been told before."""
        for phase in self.mixture.phases:
            if phase.first_row >= row and len(self.sources) > 1:
                shares = ", ".join(f"{name} {share / MILLION:.4g}" for name, share in phase.shares.items())
                logger.info("shares of rows from row %d on: %s", phase.first_row, shares)

    def shares_consumed(self, row: int) -> dict[str, float]:
        """The share that each source has in the first `row` rows, of which there is at least one."""
        consumed = self.mixture.consumed(row)
        return {name: consumed.get(name, 0) / row for name in sorted(consumed.keys() | self.sources.keys())}

    def _limit(self, name: str, epochs: int, total_rows: int | None) -> int | None:
        """Rows of `epochs` epochs of a source; None as soon as it is clear that the run ends before."""
        rows = self.sources[name]
        for epoch in range(1, epochs):
            if total_rows is not None and rows.rows_before_epoch(epoch) >= total_rows:
                return None
        return rows.rows_before_epoch(epochs)


def _source_state(rows: RowDataset, consumed: int) -> dict[str, Any]:
    return {
        "fingerprint": rows.manifest.fingerprint,
        "plan_digest": rows.plan_digest,
        "seed": rows.seed,
        "epoch": rows.locate(consumed)[0],
        "rows_consumed": consumed,
    }


def _check_alike(manifests: Sequence[Manifest], fields: Sequence[str]) -> None:
    for other, field in itertools.product(manifests[1:], fields):
        first = manifests[0]
        ours, theirs = (getattr(manifest.encoding, field) for manifest in (first, other))
        check(
            ours == theirs,
            f"The sources of a run must share their tokenizers, but {field} is {ours} in {first.folder} and {theirs} in"
            f" {other.folder}; make both with the same tokenizers, or leave one of them out.",
        )
