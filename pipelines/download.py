"""LAION's metadata becomes tars of pairs: img2dataset downloads, in rounds; every row ends as a pair or in a quarantine file.

RUN_DIR/config.yaml                 the resolved configuration
RUN_DIR/metadata.json               which files of metadata the shards were cut from
RUN_DIR/00000.tar, …                see `lavit_dist.data.downloaded_shard`
RUN_DIR/img2dataset.log             its own words
RUN_DIR/.download/                  unfinished work
RUN_DIR/summary.json                counts; it appears when all shards are whole
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from lavit_dist.config.download import MAY_CHANGE, DownloadConfig
from lavit_dist.data.download_outcome import UNANSWERED, classify
from lavit_dist.data.download_scratch import DownloadScratch
from lavit_dist.data.downloaded_shard import check_row, read_record, request_url, write_downloaded_shard
from lavit_dist.data.img2dataset import Img2dataset
from lavit_dist.data.quarantine import SampleError
from lavit_dist.data.url_table import UrlTable
from lavit_dist.engine.run_folder import RunFolder
from lavit_dist.errors import UserError, check
from lavit_dist.files import read_json, remove_leftovers, write_atomically
from lavit_dist.observe.logs import setup_logging
from pipelines.pair_folder import SUMMARY, check_is_ours

logger = logging.getLogger(__name__)
LOG = "img2dataset.log"
SCRATCH = ".download"
METADATA = "metadata.json"
ENOUGH = 100
"""So many rows of which not one had an answer are no chance: the network is down."""


def download(config: DownloadConfig) -> None:
    """Writes RUN_DIR/*.tar from `config.metadata`; raises `UserError` when nothing can be downloaded."""
    setup_logging()
    table = UrlTable(config.metadata, config.url_column, config.caption_column, config.columns, config.samples_per_shard)
    root = Path(config.run_dir)
    downloader = make_downloader(config, root)
    version = downloader.find_version()
    folder = RunFolder(root, MAY_CHANGE)
    check_is_ours(folder)
    folder.open(config)
    _check_metadata(table, root)
    remove_leftovers(root)
    unfinished = [shard for shard in range(table.shards) if read_record(root, shard) is None]
    if unfinished:
        logger.info(
            "%d rows in %d shards, of which %d are to be downloaded, by img2dataset %s",
            len(table),
            table.shards,
            len(unfinished),
            version,
        )
        Rounds(config, root, downloader).run(table.read_shards(unfinished))
    else:
        logger.info("%s is complete already", root)
    shutil.rmtree(root / SCRATCH, ignore_errors=True)
    _summarise(root, table)


@dataclass
class Tally:
    """How far the rows of a round are."""

    answered: int = 0
    """A picture came, or somebody said that there is none."""
    failed: Counter[str] = field(default_factory=Counter)
    """Failures by reason, those that are tried again included."""
    unknown: int = 0
    """Rows without any outcome."""
    asked: int = 0
    """Rows that the next pass downloads."""


class Rounds:
    """Downloads some shards at a time: all their rows once, then those again that may come yet, and writes them out meanwhile."""

    def __init__(self, config: DownloadConfig, root: Path, downloader: Img2dataset) -> None:
        self.config, self.root, self.downloader = config, root, downloader
        self.scratch = DownloadScratch(root / SCRATCH)

    def run(self, shards: Iterator[tuple[int, pa.Table]]) -> None:
        """Makes the shards, which come with their rows. While one round is written out, the next is downloaded."""
        writing: list[Future[None]] = []
        with ThreadPoolExecutor(1) as writer:
            while members := self._next_round(shards):
                self._download(members)
                for future in writing:
                    future.result()
                writing = [writer.submit(self._write, shard) for shard in members]
            for future in writing:
                future.result()

    def _next_round(self, shards: Iterator[tuple[int, pa.Table]]) -> list[int]:
        members = []
        for shard, rows in itertools.islice(shards, self.config.processes * self.config.shards_per_process):
            self.scratch.keep_rows(shard, rows)
            members.append(shard)
        return members

    def _download(self, members: Sequence[int]) -> None:
        """Passes over the members' rows until nothing is left that another pass could better.

        Rows for which img2dataset had no result go into ever smaller pieces, down to single rows, until the one is alone on which it dies.
        """
        piece = self.config.samples_per_shard
        given_up = False
        for number in itertools.count():
            attempt = self.scratch.start_attempt()
            tally = self._prepare(attempt, members, retry=number <= self.config.retries, unknown=not given_up)
            self._check_network(tally, members)
            if not tally.asked:
                shutil.rmtree(attempt)
                return
            if number:
                logger.info("%d rows are tried again (%s)", tally.asked, _describe(tally.failed) or "no result")
                time.sleep(self.config.retry_wait)
            given_up = piece == 1
            code = self.downloader.run(attempt, piece)
            got = self.scratch.harvest(attempt)
            check(got > 0 or code is None, f"img2dataset {self.downloader.describe_end(code or 0)}.")
            if got < tally.asked:
                logger.warning("img2dataset ended before it had a result for %d of %d rows", tally.asked - got, tally.asked)
                piece = max(1, piece // 10)

    def _prepare(self, attempt: Path, members: Sequence[int], *, retry: bool, unknown: bool) -> Tally:
        """Gives `attempt` the rows to download: those without a result, if `unknown`, and those whose failure may pass, if `retry`."""
        tally = Tally()
        for shard in members:
            outcomes = self.scratch.outcomes(shard)
            rows, urls = [], []
            for row, url, caption in zip(
                *(self.scratch.rows(shard)[name].to_pylist() for name in ("row", "url", "caption")), strict=True
            ):
                if not _is_worth_fetching(url, caption):
                    continue
                failure = classify(*outcomes[row]) if row in outcomes else None
                if row not in outcomes:
                    tally.unknown += 1
                    again = unknown
                else:
                    again = retry and failure is not None and failure.may_pass
                    tally.answered += failure is None or failure.reason not in UNANSWERED
                    if failure is not None and failure.may_pass:
                        tally.failed[failure.reason] += 1
                if again:
                    rows.append(row)
                    urls.append(request_url(url))
            if rows:
                self.scratch.add_input(attempt, shard, rows, urls)
                tally.asked += len(rows)
        return tally

    def _check_network(self, tally: Tally, members: Sequence[int]) -> None:
        """Raises `UserError` when nothing more is to be done and nobody has answered; what is known is forgotten, to be asked again."""
        if tally.asked or tally.answered or tally.failed.total() < ENOUGH:
            return
        for shard in members:
            self.scratch.forget_results(shard)
        raise UserError(
            f"None of {tally.failed.total()} addresses answered ({_describe(tally.failed)}); see that this machine reaches them, and start again."
        )

    def _write(self, shard: int) -> None:
        record = write_downloaded_shard(
            self.root, shard, self.scratch.rows(shard), self.scratch.outcomes(shard), self.scratch.results(shard)
        )
        self.scratch.drop(shard)
        logger.info("shard %05d: %d pairs of %d rows; %s", shard, record["pairs"], record["rows"], _describe(record["quarantined"]))


def make_downloader(config: DownloadConfig, root: Path) -> Img2dataset:
    """img2dataset with the settings of `config`. It gets addresses alone: captions and other columns are joined to its results."""
    arguments: dict[str, Any] = {
        "input_format": "parquet",
        "output_format": "parquet",
        "save_additional_columns": ["row", "shard"],
        "distributor": "multiprocessing",
        "processes_count": config.processes,
        "thread_count": config.threads,
        "timeout": config.timeout,
        "image_size": config.image_size,
        "resize_mode": config.resize_mode,
        "resize_only_if_bigger": config.resize_only_if_bigger,
        "encode_quality": config.encode_quality,
        "min_image_size": config.min_image_size,
        "extract_exif": False,
        "enable_wandb": False,
    }
    if config.max_aspect_ratio is not None:
        arguments["max_aspect_ratio"] = config.max_aspect_ratio
    limits = {"max_seconds": config.max_seconds, "max_bytes": config.max_bytes}
    python = Path(config.downloader_python).expanduser()
    return Img2dataset(python, arguments, limits, config.max_pixels, config.stall_timeout, root / LOG)


def _is_worth_fetching(url: str | None, caption: str | None) -> bool:
    try:
        check_row(url, caption)
    except SampleError:
        return False
    return True


def _check_metadata(table: UrlTable, root: Path) -> None:
    path = root / METADATA
    if not path.exists():
        write_atomically(path, json.dumps({"files": table.state()}, indent=1).encode())
        return
    then = read_json(path, "remove the run's folder to start afresh").get("files")
    for old, new in itertools.zip_longest(then or [], table.state()):
        check(
            old == new,
            f"The metadata is not that which {root} was begun with: where it had {old}, there is now {new};"
            " put back what changed, or give another run_dir.",
        )


def _summarise(root: Path, table: UrlTable) -> None:
    rows, pairs, reasons = 0, 0, Counter[str]()
    for shard in range(table.shards):
        record = read_record(root, shard)
        assert record is not None, "every shard has been written"
        rows, pairs = rows + record["rows"], pairs + record["pairs"]
        reasons.update(record["quarantined"])
    assert rows == len(table) == pairs + reasons.total(), "every row is a pair or in quarantine"
    summary = {"rows": rows, "pairs": pairs, "shards": table.shards, "quarantined": dict(sorted(reasons.items()))}
    write_atomically(root / SUMMARY, json.dumps(summary, indent=1).encode())
    check(pairs > 0, f"None of the {rows} rows of metadata gave a pair ({_describe(reasons)}); see {root}/*.quarantine.jsonl.")
    logger.info("wrote %s: %d pairs of %d rows; quarantined: %s", root, pairs, rows, _describe(reasons) or "none")


def _describe(reasons: Counter[str] | dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
