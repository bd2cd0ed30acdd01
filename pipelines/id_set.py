"""Finished id sets: proof that one is whole, what is in it, other sizes of shards, several sets in one, no image twice.

OUTPUT/stats.json                     what is in a set
OUTPUT/lengths-text.png, …            how long texts, images and documents are, and how often each code is used
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lavit_dist.config.id_cache import IdCacheConfig
from lavit_dist.data.deduplicate import deduplicate as deduplicate_set
from lavit_dist.data.id_set_check import check_sound, find_flaws
from lavit_dist.data.manifest import Manifest, load_manifest
from lavit_dist.data.merge_id_sets import merge as merge_sets
from lavit_dist.data.reshard import reshard as reshard_set
from lavit_dist.errors import check
from lavit_dist.evaluation.id_set_stats import IdSetStats, gather_stats
from lavit_dist.evaluation.id_set_words import describe_stats
from lavit_dist.files import replacing, write_atomically
from lavit_dist.observe.logs import setup_logging
from lavit_dist.observe.report.charts import histogram_figure, zipf_figure

logger = logging.getLogger(__name__)
STATS = "stats.json"
DOTS_PER_INCH = 160


def verify(location: str, cache: IdCacheConfig) -> bool:
    """Prints a table of what is wrong with an id set; returns whether nothing is."""
    setup_logging()
    manifest = load_manifest(location, cache.storage_options)
    console = Console(highlight=False)
    flaws = find_flaws(manifest, cache)
    if flaws:
        table = Table("file", "", box=None, header_style="bold")
        for flaw in flaws:
            table.add_row(Text(flaw.file), Text(flaw.what, "bold red"))
        console.print(table)
    files = len({flaw.file for flaw in flaws})
    total = f"{files} files FAIL" if flaws else "as the manifest says"
    console.print(Text(f"{_headline(manifest)}: {total}", "bold"), soft_wrap=True)
    return not flaws


def stats(location: str, cache: IdCacheConfig, output: str) -> None:
    """Prints what is in an id set, and writes it to `output` with its charts."""
    setup_logging()
    gathered = gather_stats(load_manifest(location, cache.storage_options), cache)
    values = gathered.to_dict()
    folder = Path(output)
    for name, figure in _figures(gathered).items():
        with replacing(folder / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=DOTS_PER_INCH)
    write_atomically(folder / STATS, json.dumps(values, indent=1).encode())
    console = Console(highlight=False)
    console.print(Text(_headline(gathered.manifest), "bold"), soft_wrap=True)
    for table in describe_stats(values):
        console.print(table)
    console.print(f"wrote {folder}/{STATS} and charts")


def reshard(folder: str, output: str, *, num_shards: int | None, shard_mb: float | None) -> None:
    """Writes the set in `folder` to `output` in so many shards, or in shards of so many MB (10^6 bytes)."""
    setup_logging()
    _report(reshard_set(_open(folder), Path(output), num_shards=num_shards, shard_bytes=shard_mb and shard_mb * 1e6))


def merge(folders: Sequence[str], output: str) -> None:
    """Writes the sets in `folders`, one after the other, to `output`."""
    setup_logging()
    _report(merge_sets([_open(folder) for folder in folders], Path(output)))


def deduplicate(folder: str, output: str, *, max_distance: int, against: Sequence[str]) -> None:
    """Writes the set in `folder` to `output` without copies, also of images of the sets in `against`."""
    setup_logging()
    source = _open(folder)
    kept = deduplicate_set(source, Path(output), max_distance=max_distance, against=[_open(other) for other in against])
    before, after = (sum(shard.images for shard in manifest.shards) for manifest in (source, kept))
    logger.info("%d of %d images are copies", before - after, before)
    _report(kept)


def _figures(gathered: IdSetStats) -> dict[str, Figure]:
    """Charts by the names of their files, of what the set has."""
    figures = {}
    for name, lengths, of in (
        ("text", gathered.text_lengths, "text ids per text"),
        ("image", gathered.image_lengths, "codes per image"),
        ("document", gathered.document_lengths, "tokens per document"),
    ):
        if lengths.any():
            figures[f"lengths-{name}"] = histogram_figure(lengths.tolist(), x=of, y=f"{name}s")
    if gathered.code_counts.any():
        figures["code-frequencies"] = zipf_figure(
            gathered.code_counts.tolist(), gathered.zipf_exponent, x="rank of code", y="times used, over images"
        )
    return figures


def _open(folder: str) -> Manifest:
    """The set in a local folder, which is sound."""
    manifest = load_manifest(folder)
    check(isinstance(manifest.folder, Path), f"{folder} is not on this machine; copy the set to a local folder first.")
    check_sound(manifest)
    return manifest


def _report(manifest: Manifest) -> None:
    Console(highlight=False).print(Text(f"wrote {_headline(manifest)}", "bold"), soft_wrap=True)


def _headline(manifest: Manifest) -> str:
    documents, images = (sum(getattr(shard, name) for shard in manifest.shards) for name in ("documents", "images"))
    return f"{manifest.folder} {manifest.fingerprint[:16]}: {len(manifest.shards)} shards, {documents} documents of {images} images"
