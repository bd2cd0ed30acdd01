"""From the rows of a shard and img2dataset's results to a tar of pairs, a quarantine file, and a record that is written last.

FOLDER/00012.tar                  the pairs; absent when no row gave one
FOLDER/00012.quarantine.jsonl     all other rows
FOLDER/00012_stats.json           counts, and the size of the tar: the mark that the shard is whole
"""

from __future__ import annotations

import json
import math
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lavit_dist.data.download_outcome import NO_RESULT, classify
from lavit_dist.data.pair_writer import EncodedPair, write_shard
from lavit_dist.data.pairs import clean_captions
from lavit_dist.data.quarantine import Quarantined, SampleError, count_reasons, write_quarantine
from lavit_dist.files import write_atomically

STAGE = "download"
MEASURED = ("width", "height", "original_width", "original_height", "sha256")
"""What img2dataset tells of a picture: its size as it is written and as it came, pixels, and the digest of the file that came."""
LONGEST_MESSAGE = 200
URL_CHARACTERS = "%/:=&?~#+!$,;'@()*[]"
"""Characters that an address may hold beside letters, digits and `_.-`."""


def request_url(url: str) -> str:
    """The address as it can be asked for: letters outside ASCII and blanks are percent-encoded, which `urllib` doesn't do."""
    return urllib.parse.quote(url.strip(), safe=URL_CHARACTERS)


def check_row(url: str | None, caption: str | None) -> str:
    """The caption of a row whose picture is worth fetching. Raises `SampleError`: `bad_url`, or those of `clean_captions`."""
    if not (url or "").strip().lower().startswith(("http://", "https://")):
        raise SampleError("bad_url", f"{url!r} is no http or https address")
    return clean_captions([caption or ""])[0]


def write_downloaded_shard(
    folder: Path, shard: int, rows: pa.Table, outcomes: Mapping[int, tuple[str, str | None]], results: Sequence[Path]
) -> dict[str, Any]:
    """Writes the three files and returns the record: every one of `rows` is a pair or a line of the quarantine file, in their order.

    A pair's key is its row's number in nine digits, as in LAION-400M's tars.
    """
    pictures = _read_pictures(results)
    pairs, quarantined = list[EncodedPair](), list[Quarantined]()
    for row in rows.to_pylist():
        key = f"{row['row']:09d}"
        try:
            caption = check_row(row["url"], row["caption"])
            picture = _picture(row["row"], outcomes, pictures)
        except SampleError as error:
            quarantined.append(Quarantined.of(key, STAGE, error))
        else:
            ours = {"url": row["url"]} | {name: picture[name] for name in MEASURED}
            carried = {f"source_{name}" if name in ours else name: value for name, value in row["metadata"].items()}
            pairs.append(EncodedPair(key, picture["jpg"], "jpg", (caption,), ours | _plain(carried)))
    tar = folder / f"{shard:05d}.tar"
    write_quarantine(tar.with_suffix(".quarantine.jsonl"), quarantined)
    if pairs:
        write_shard(tar, pairs)
    record = {
        "rows": len(rows),
        "pairs": len(pairs),
        "tar_bytes": tar.stat().st_size if pairs else 0,
        "quarantined": count_reasons(quarantined),
    }
    write_atomically(_record_path(folder, shard), json.dumps(record).encode())
    return record


def read_record(folder: Path, shard: int) -> dict[str, Any] | None:
    """What `write_downloaded_shard` returned, if the shard's files are those that it wrote; else they are removed."""
    path = _record_path(folder, shard)
    tar, quarantine = folder / f"{shard:05d}.tar", folder / f"{shard:05d}.quarantine.jsonl"
    try:
        record = json.loads(path.read_bytes())
        size = tar.stat().st_size if record["pairs"] else 0
        if (
            size == record["tar_bytes"]
            and quarantine.exists()
            and record["rows"] == record["pairs"] + sum(record["quarantined"].values())
        ):
            return record
    except (OSError, ValueError, KeyError, TypeError):
        pass
    for leftover in (path, tar, quarantine):
        leftover.unlink(missing_ok=True)
    return None


def _record_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}_stats.json"


def _read_pictures(results: Sequence[Path]) -> dict[int, dict[str, Any]]:
    """By row, what came: `jpg`, the picture as it is to be written, and what is `MEASURED` of it."""
    columns = ["row", "status", "jpg", *MEASURED]
    tables = (pq.read_table(path, columns=columns) for path in results)
    came = [table.filter(pc.equal(table["status"], "success")) for table in tables]
    return {picture["row"]: picture for table in came for picture in table.to_pylist()}


def _picture(row: int, outcomes: Mapping[int, tuple[str, str | None]], pictures: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    if row not in outcomes:
        raise SampleError(NO_RESULT.reason, "img2dataset ended each time before it had a result for this row")
    status, message = outcomes[row]
    failure = classify(status, message)
    if failure is not None:
        raise SampleError(failure.reason, " ".join((message or status).split())[:LONGEST_MESSAGE])
    return pictures[row]


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON can hold them: no number that isn't one, and dates and decimals as text."""
    finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()}
    return json.loads(json.dumps(finite, default=str))
