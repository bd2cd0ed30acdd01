"""Settings of `data_prep/download.py`."""

from __future__ import annotations

from typing import Literal

from lavit_dist.config.base import config
from lavit_dist.config.images import MAX_PIXELS
from lavit_dist.errors import check

MAY_CHANGE = (
    *("metadata", "downloader_python", "processes", "threads", "shards_per_process", "timeout", "max_seconds"),
    *("retries", "retry_wait", "stall_timeout"),
)
"""Settings that a run which goes on may change: they decide how pictures are fetched, never what is written of one that came."""


@config
class DownloadConfig:
    """Which rows of metadata become pairs, what their pictures become, and how patiently they are fetched."""

    metadata: str
    """LAION's metadata: a .parquet file, a folder of them, or a pattern such as DIR/part-*.parquet."""
    run_dir: str
    """Folder of the tars: 00000.tar, 00000.quarantine.jsonl, 00000_stats.json and so on, config.yaml, summary.json."""
    url_column: str = "URL"
    """Column with a picture's address."""
    caption_column: str = "TEXT"
    """Column with its caption."""
    columns: tuple[str, ...] | None = None
    """Further columns that go into each pair's .json, such as similarity and NSFW; by default all that there are."""
    samples_per_shard: int = 10_000
    """Rows of metadata in one tar, of which some give no pair. Its pictures are in memory while it is written: 300 MB of 256 px."""

    image_size: int = 256
    """Pixels that `resize_mode` speaks of; LAION-400M's published tars have 256."""
    resize_mode: Literal["keep_ratio", "keep_ratio_largest", "center_crop", "border", "no"] = "keep_ratio"
    """img2dataset's: the shorter side becomes `image_size`, the longer one does, a square is cut out, white fills it up to a square, or none."""
    resize_only_if_bigger: bool = True
    """Leave pictures alone that are smaller than that."""
    encode_quality: int = 95
    """JPEG quality of what is written."""
    min_image_size: int = 0
    """Pictures with a shorter side below this, pixels, are quarantined."""
    max_aspect_ratio: float | None = None
    """Pictures whose longer side is more than this many times the shorter one are quarantined."""
    max_pixels: int = MAX_PIXELS
    """Pictures with more pixels than this are quarantined as bombs before they are decoded."""
    max_bytes: int = 64 * 2**20
    """A file is not fetched beyond this many bytes."""

    downloader_python: str = ".venv-img2dataset/bin/python"
    """Interpreter of an environment that has img2dataset, such as the one that `make downloader` makes."""
    processes: int = 4
    """Processes that download, each one shard at a time."""
    threads: int = 64
    """Downloads at a time in each."""
    shards_per_process: int = 16
    """Shards for each process before rows that failed are tried again; so many, twice, is what lies on the disk unfinished."""
    timeout: float = 10.0
    """Seconds without an answer, or within one, after which a download has failed."""
    max_seconds: float = 60.0
    """Seconds after which one that still trickles in has failed."""
    retries: int = 2
    """How often rows are tried again whose failure may pass, such as a time-out; a 404 is final."""
    retry_wait: float = 30.0
    """Seconds before they are."""
    stall_timeout: float = 300.0
    """Seconds without any progress after which img2dataset is ended and started anew; it waits for ever for a worker that was killed."""

    def validate(self) -> None:
        for name in ("samples_per_shard", "image_size", "max_pixels", "max_bytes", "processes", "threads", "shards_per_process"):
            check(getattr(self, name) > 0, f"{name} {getattr(self, name)} must be at least 1.")
        for name in ("timeout", "max_seconds", "stall_timeout"):
            check(getattr(self, name) > 0, f"{name} {getattr(self, name)} must be above 0 seconds.")
        for name in ("retries", "retry_wait", "min_image_size"):
            check(getattr(self, name) >= 0, f"{name} {getattr(self, name)} must not be negative.")
        check(1 <= self.encode_quality <= 100, f"encode_quality {self.encode_quality} must lie between 1 and 100.")
        check(
            self.max_aspect_ratio is None or self.max_aspect_ratio >= 1,
            f"max_aspect_ratio {self.max_aspect_ratio} must be at least 1; leave it out to take all.",
        )
        check(
            self.stall_timeout > self.timeout,
            f"stall_timeout {self.stall_timeout} must be above timeout {self.timeout}: a single slow answer is no standstill.",
        )
        taken = {self.url_column, self.caption_column}
        check(
            self.url_column != self.caption_column and not taken & set(self.columns or ()),
            f"url_column {self.url_column}, caption_column {self.caption_column} and columns must name different columns.",
        )
