"""Image-text pairs as they lie in tars."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lavit_dist.data.quarantine import Quarantined, SampleError
from lavit_dist.data.tar_reader import FileLocation, RawSample, index_shard, read_from
from lavit_dist.errors import UserError

SPLITS = ("train", "heldout")
STAGE = "read_pairs"


@dataclass(frozen=True)
class PairSample:
    """A picture that hasn't been decoded yet, its captions (at least one, none empty), and what else its .json says."""

    key: str
    image_location: FileLocation
    captions: tuple[str, ...]
    metadata: dict[str, Any]


def list_shards(folder: str | Path) -> list[Path]:
    """The tars of a folder by name. Raises `UserError` when there are none."""
    folder = Path(folder)
    shards = sorted(path for path in folder.glob("*.tar") if path.is_file())
    if not shards:
        splits = [split for split in SPLITS if any((folder / split).glob("*.tar"))]
        hint = (
            f"name one of its splits: {', '.join(str(folder / split) for split in splits)}"
            if splits
            else "data_prep/ingest.py makes them"
        )
        raise UserError(
            f"{folder} {'holds no' if folder.is_dir() else 'does not exist and so holds no'} *.tar files of pairs; {hint}."
        )
    return shards


def read_pairs(shard: Path) -> tuple[list[PairSample], list[Quarantined]]:
    """The pairs of a tar and a record of what can't be used in it. Captions are `captions` of the .json, or else the .txt.

    Adds to the reasons of `index_shard`: `empty_caption`, `malformed_caption` (not UTF-8), `malformed_metadata` (not a JSON object, or
    `captions` is not a list of strings).
    """
    index = index_shard(shard)
    pairs: list[PairSample] = []
    quarantined = list(index.quarantined)
    if not index.samples:
        return pairs, quarantined
    with shard.open("rb") as file:
        for sample in index.samples:
            try:
                pairs.append(read_pair(file, sample))
            except SampleError as error:
                quarantined.append(Quarantined.of(sample.key, STAGE, error))
    return pairs, quarantined


def clean_captions(captions: Iterable[str]) -> tuple[str, ...]:
    """The captions without surrounding blanks and empty ones.

    Raises `SampleError`: `empty_caption` when none is left, `malformed_caption` when one isn't valid Unicode.
    """
    cleaned = tuple(stripped for caption in captions if (stripped := caption.strip()))
    if not cleaned:
        raise SampleError("empty_caption", "no caption has a visible character")
    try:
        "".join(cleaned).encode()
    except UnicodeEncodeError as error:
        raise SampleError("malformed_caption", f"a caption can't be written as UTF-8: {error}") from error
    return cleaned


def read_pair(file: BinaryIO, sample: RawSample) -> PairSample:
    """One sample of the open tar `file`; raises `SampleError` as told at `read_pairs`."""
    metadata = _read_metadata(file, sample)
    captions = metadata.get("captions")
    if captions is None:
        captions = [_read_text(file, sample)] if "txt" in sample.files else [metadata.get("caption") or ""]
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise SampleError("malformed_metadata", "`captions` in the .json is not a list of strings")
    image = sample.image
    assert image is not None, "index_shard lets no sample without an image through"
    return PairSample(sample.key, image, clean_captions(captions), metadata)


def _read_text(file: BinaryIO, sample: RawSample) -> str:
    try:
        return read_from(file, sample.files["txt"]).decode()
    except UnicodeDecodeError as error:
        raise SampleError("malformed_caption", f"the .txt is not UTF-8: {error}", error.object) from error


def _read_metadata(file: BinaryIO, sample: RawSample) -> dict[str, Any]:
    if "json" not in sample.files:
        return {}
    data = read_from(file, sample.files["json"])
    try:
        metadata = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleError("malformed_metadata", f"the .json can't be parsed: {error}", data) from error
    if not isinstance(metadata, dict):
        raise SampleError("malformed_metadata", f"the .json holds a {type(metadata).__name__}, not an object", data)
    return metadata
