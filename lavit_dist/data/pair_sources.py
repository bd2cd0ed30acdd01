"""The forms in which people keep pictures and captions, read into one list: folders, tables, JSON lines, tars."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lavit_dist.data.pairs import read_pairs
from lavit_dist.data.quarantine import Quarantined, SampleError
from lavit_dist.data.tar_reader import FileLocation
from lavit_dist.errors import UserError, check

STAGE = "read_source"
IMAGE_COLUMNS = ("image", "image_path", "file_name", "path")
CAPTION_COLUMNS = ("captions", "caption", "text")
KEY_COLUMN = "key"
csv.field_size_limit(1 << 24)  # characters; the library's own limit would refuse a file for one long caption
DELIMITERS = {".csv": ",", ".tsv": "\t"}
TABLE_SUFFIXES = (*DELIMITERS, ".jsonl")
FOLDER_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


@dataclass(frozen=True)
class SourcePair:
    """A pair as its owner keeps it: nothing about it has been checked yet."""

    key: str
    name: str
    """How the source names the picture; the same on every machine."""
    image: Path | FileLocation
    captions: tuple[str, ...]
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """Columns of a captions file; None is found by the usual names."""

    image: str | None = None
    caption: str | None = None
    key: str | None = None


def read_source(source: Path, columns: Columns, image_root: Path | None = None) -> tuple[list[SourcePair], list[Quarantined]]:
    """Lists the pairs of a folder of pictures with .txt captions, a folder with a captions file or tars in it, or a captions file.

    Rows that name the same picture become one pair with several captions; pictures must lie beneath `image_root`, or the captions file's
    folder. Raises `UserError` when `source` is none of these.
    """
    check(
        source.exists(), f"source {source} does not exist; name a folder of pictures and captions, or a .csv, .tsv or .jsonl file."
    )
    if source.is_file():
        return _read_table(source, columns, image_root or source.parent)
    check(
        source.is_dir(),
        f"source {source} is neither a folder nor a file; name a folder of pictures and captions, or a captions file.",
    )
    tars = sorted(path for path in source.glob("*.tar") if path.is_file())
    if tars:
        return _read_tars(tars)
    tables = sorted(path for path in source.iterdir() if path.suffix.lower() in TABLE_SUFFIXES and path.is_file())
    if len(tables) > 1:
        raise UserError(
            f"source {source} holds several captions files ({', '.join(path.name for path in tables)}); name the one to use."
        )
    return _read_table(tables[0], columns, image_root or source) if tables else _read_folder(source)


def _read_folder(folder: Path) -> tuple[list[SourcePair], list[Quarantined]]:
    """Every picture below `folder` and the .txt of the same stem beside it; each line of the .txt is a caption."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    images = [path for path in files if path.suffix.lower() in FOLDER_SUFFIXES]
    check(
        bool(images),
        f"source {folder} holds no pictures ({', '.join(FOLDER_SUFFIXES)}), no captions file ({', '.join(TABLE_SUFFIXES)}) and no .tar;"
        " name the folder that does.",
    )
    pairs, quarantined = [], []
    for image in images:
        name = image.relative_to(folder).as_posix()
        text = image.with_suffix(".txt")
        try:
            captions = _split_lines(text)
        except SampleError as error:
            quarantined.append(Quarantined.of(name, STAGE, error))
        else:
            pairs.append(SourcePair(name.rpartition(".")[0], name, image, captions, {}))
    stems = {image.with_suffix("") for image in images}
    for path in files:
        if path.suffix == ".txt" and path.with_suffix("") not in stems:
            problem = SampleError("missing_image", "a .txt without a picture of the same name")
            quarantined.append(Quarantined.of(path.relative_to(folder).as_posix(), STAGE, problem))
    return pairs, quarantined


def _split_lines(text: Path) -> tuple[str, ...]:
    try:
        return tuple(text.read_text(encoding="utf-8-sig").splitlines())
    except FileNotFoundError:
        raise SampleError("missing_caption", f"no {text.name} beside the picture") from None
    except UnicodeDecodeError as error:
        raise SampleError("malformed_caption", f"{text.name} is not UTF-8: {error}") from error
    except OSError as error:  # a folder, a loop of links, no permission
        raise SampleError("malformed_caption", f"{text.name} can't be read: {error.strerror}") from error


def _read_tars(tars: list[Path]) -> tuple[list[SourcePair], list[Quarantined]]:
    pairs, quarantined = [], []
    for tar in tars:
        found, refused = read_pairs(tar)
        pairs += [
            SourcePair(sample.key, f"{tar.name}/{sample.key}", sample.image_location, sample.captions, sample.metadata)
            for sample in found
        ]
        quarantined += refused
    return pairs, quarantined


def _read_table(path: Path, columns: Columns, root: Path) -> tuple[list[SourcePair], list[Quarantined]]:
    check(
        path.suffix.lower() in TABLE_SUFFIXES,
        f"source {path} is not a folder and does not end in {', '.join(TABLE_SUFFIXES)}; convert it to one of these, or name the folder of the tars that it is one of.",
    )
    rows: list[tuple[str, dict[str, Any]]] = []
    quarantined: list[Quarantined] = []
    for where, row in _rows(path):
        if isinstance(row, SampleError):
            quarantined.append(Quarantined.of(where, STAGE, row))
        else:
            rows.append((where, row))
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    check(bool(names) or bool(quarantined), f"The captions file {path} holds no rows; fill it, or name another.")
    image_column = _choose_column(path, "image_column", columns.image, IMAGE_COLUMNS, names)
    caption_column = _choose_column(path, "caption_column", columns.caption, CAPTION_COLUMNS, names)
    if columns.key is not None:
        _choose_column(path, "key_column", columns.key, (), names)
    key_column = columns.key or KEY_COLUMN
    pairs: dict[str, SourcePair] = {}
    for where, row in rows:
        try:
            image = _image_name(row.get(image_column), path.parent, root)
            captions = _captions(row.get(caption_column))
        except SampleError as error:
            quarantined.append(Quarantined.of(str(row.get(key_column) or where), STAGE, error))
            continue
        if image in pairs:
            pairs[image] = replace(pairs[image], captions=pairs[image].captions + captions)
            continue
        key = str(row.get(key_column) or Path(image).stem)
        metadata = {name: value for name, value in row.items() if name not in (image_column, caption_column)}
        pairs[image] = SourcePair(key, image, path.parent / image, captions, metadata)
    return list(pairs.values()), quarantined


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | SampleError]]:
    """Each row by where it stands, or what is wrong with it; raises `UserError` when the file as a whole can't be read."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() in DELIMITERS:
                reader = csv.DictReader(file, delimiter=DELIMITERS[path.suffix.lower()])
                for row in reader:
                    yield f"line {reader.line_num}", {name: value for name, value in row.items() if name is not None}
            else:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield f"line {number}", _parse_line(line)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"The captions file {path} can't be read ({error}); give a readable one, in UTF-8.") from error


def _parse_line(line: str) -> dict[str, Any] | SampleError:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return SampleError("malformed_row", f"not JSON: {error}", line.encode())
    return row if isinstance(row, dict) else SampleError("malformed_row", f"a {type(row).__name__}, not an object", line.encode())


def _choose_column(path: Path, setting: str, wanted: str | None, usual: tuple[str, ...], names: list[str]) -> str:
    if wanted is not None:
        check(wanted in names, f"{setting} {wanted!r} is not a column of {path}; its columns are {', '.join(names) or 'none'}.")
        return wanted
    found = next((name for name in usual if name in names), None)
    if found is None:
        raise UserError(
            f"{path} has none of the columns {', '.join(usual)}; set {setting} to one of its own: {', '.join(names) or 'none'}."
        )
    return found


def _image_name(value: Any, folder: Path, root: Path) -> str:
    if not isinstance(value, str) or not value.strip():
        raise SampleError("missing_image", "the row names no picture")
    if "://" in value:
        raise SampleError("missing_image", f"{value} is an address; download the pictures first, for example with img2dataset")
    name = value.strip()
    if not Path(os.path.normpath(folder.absolute() / name)).is_relative_to(os.path.normpath(root.absolute())):
        raise SampleError("outside_folder", f"{name} doesn't lie beneath {root}; name a folder that it lies beneath in image_root")
    return name


def _captions(value: Any) -> tuple[str, ...]:
    captions = value if isinstance(value, list) else [value or ""]
    if not all(isinstance(caption, str) for caption in captions):
        raise SampleError("malformed_row", "the caption is neither a string nor a list of strings")
    return tuple(captions)
