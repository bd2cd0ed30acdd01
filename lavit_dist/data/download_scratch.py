"""What a download keeps on the disk until its shards are whole.

FOLDER/rows/00012.arrow             the rows of shard 12
FOLDER/results/00012-000.parquet    what img2dataset made of some of them, pictures and failures, one file per piece that it finished
FOLDER/attempt-x/in, out            a run of img2dataset; each has a folder of its own, so that nothing left over of one disturbs the next
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lavit_dist.files import replacing

logger = logging.getLogger(__name__)
OUTCOME_COLUMNS = ("row", "status", "error_message")


class DownloadScratch:
    """The folder of a run's unfinished work. What finished pieces a killed run left is taken over."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._rows, self._results = root / "rows", root / "results"
        for folder in (self._rows, self._results):
            folder.mkdir(parents=True, exist_ok=True)
        for attempt in sorted(root.glob("attempt-*")):
            self.harvest(attempt)

    def keep_rows(self, shard: int, rows: pa.Table) -> None:
        """Keeps the rows of a shard (see `UrlTable.read_shards`) until it is dropped."""
        with replacing(self._rows / f"{shard:05d}.arrow") as path, pa.ipc.new_file(str(path), rows.schema) as writer:
            writer.write_table(rows)

    def rows(self, shard: int) -> pa.Table:
        """The rows of a shard."""
        with pa.memory_map(str(self._rows / f"{shard:05d}.arrow")) as file:
            return pa.ipc.open_file(file).read_all()

    def results(self, shard: int) -> list[Path]:
        """Files of results of a shard, older ones first."""
        return sorted(self._results.glob(f"{shard:05d}-*.parquet"))

    def outcomes(self, shard: int) -> dict[int, tuple[str, str | None]]:
        """img2dataset's last status and message for each row of a shard that it had an outcome for."""
        outcomes: dict[int, tuple[str, str | None]] = {}
        for path in self.results(shard):
            columns: dict[str, list[Any]] = pq.read_table(path, columns=list(OUTCOME_COLUMNS)).to_pydict()
            outcomes |= {row: (status, message) for row, status, message in zip(*columns.values(), strict=True)}
        return outcomes

    def start_attempt(self) -> Path:
        """The folder of a new run, which takes inputs by `add_input`."""
        attempt = Path(tempfile.mkdtemp(prefix="attempt-", dir=self.root))
        (attempt / "in").mkdir()
        return attempt

    def add_input(self, attempt: Path, shard: int, rows: Iterable[int], urls: Iterable[str]) -> None:
        """Gives a run rows of a shard to download."""
        table = pa.table({"url": pa.array(urls, pa.string()), "row": pa.array(rows, pa.int64())})
        pq.write_table(
            table.append_column("shard", pa.array([shard] * len(table), pa.int64())), attempt / "in" / f"{shard:05d}.parquet"
        )

    def harvest(self, attempt: Path) -> int:
        """Takes over the pieces that a run has finished, removes the rest, and returns how many rows there were."""
        rows = 0
        for mark in sorted((attempt / "out").glob("*_stats.json")):  # written when a piece is whole
            piece = mark.with_name(mark.name.replace("_stats.json", ".parquet"))
            try:
                shards = pq.read_table(piece, columns=["shard"])["shard"]
            except (OSError, pa.ArrowInvalid) as error:  # the machine went down before it was on the disk
                logger.warning("%s is damaged (%s) and is downloaded again", piece, error)
                continue
            if len(shards):
                shard = shards[0].as_py()
                piece.replace(self._results / f"{shard:05d}-{self._next_number(shard):03d}.parquet")
                rows += len(shards)
        shutil.rmtree(attempt, ignore_errors=True)
        return rows

    def forget_results(self, shard: int) -> None:
        """Removes what is known of a shard's downloads."""
        for path in self.results(shard):
            path.unlink()

    def drop(self, shard: int) -> None:
        """Removes all of a shard."""
        self.forget_results(shard)
        (self._rows / f"{shard:05d}.arrow").unlink(missing_ok=True)

    def _next_number(self, shard: int) -> int:
        results = self.results(shard)
        return int(results[-1].stem.rpartition("-")[2]) + 1 if results else 0
