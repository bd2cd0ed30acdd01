"""The rows of a text corpus: JSON lines, plain or compressed, and Parquet, as a stream. Whatever is wrong with a row is said in its place."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lavit_dist.data.quarantine import SampleError

COMPRESSIONS = {".jsonl": None, ".jsonl.gz": "gzip", ".jsonl.zst": "zstd", ".json.gz": "gzip", ".json.zst": "zstd"}
"""How JSON lines may be packed, by the end of a file's name."""
PARQUET = ".parquet"
FORMATS = (*COMPRESSIONS, PARQUET)
LONGEST_LINE = 1 << 26
"""Bytes; what is longer is a file without line ends rather than a text."""
READ_BYTES = 1 << 16
"""What is asked of a decompressor at a time: of a damaged file, less than this is lost before the damage."""
COLUMN_BYTES = 1 << 20
"""Buffer of each Parquet column, in place of its whole part of a row group."""
BATCH_ROWS = 128
"""Parquet rows decoded at a time; a text may have megabytes."""


@dataclass(frozen=True)
class Columns:
    """Where a row has what is needed of it."""

    text: str
    key: str | None = None
    """None takes the file's name and the number of the row."""


@dataclass(frozen=True)
class CorpusRow:
    """A row that was found, usable or not."""

    file: str
    number: int
    """From 1: of JSON lines, the line."""
    size: int
    """Bytes of the line, or in Parquet of the text."""
    key: str
    """Its own name if it has one that can be used, else file and number."""
    text: str | SampleError
    """The text, unchanged; or why it can't be used."""


def read_rows(path: Path, name: str, columns: Columns) -> Iterator[CorpusRow]:
    """The rows of the corpus file at `path`, called `name`, in order. Blank lines are none. Memory holds a few rows at a time.

    Why a row is unusable: `not_utf8`, `malformed_row` (no JSON object), `line_too_long`, `missing_text`, `wrong_type` (not a string),
    `lone_surrogate`, `empty_text`, `malformed_key`. Raises `SampleError` where the file can't be read on: `truncated_file`,
    `unreadable_file`, `missing_column` (Parquet).
    """
    try:
        yield from _parquet_rows(path, name, columns) if name.endswith(PARQUET) else _json_rows(path, name, columns)
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's word, not a decoder's: another try may help
        reason = "truncated_file" if "truncated" in str(error).lower() else "unreadable_file"
        raise SampleError(reason, " ".join(str(error).split())[:500]) from error


def _json_rows(path: Path, name: str, columns: Columns) -> Iterator[CorpusRow]:
    compression = next(kind for suffix, kind in COMPRESSIONS.items() if name.endswith(suffix))
    with pa.input_stream(str(path), compression=compression) as stream, io.BufferedReader(stream, READ_BYTES) as file:
        for number, (line, size) in enumerate(_lines(file), start=1):
            values: dict[str, Any] | SampleError
            if size > LONGEST_LINE:
                values = SampleError(
                    "line_too_long", f"a line of {size} bytes, more than {LONGEST_LINE}; it begins {line[:40]!r}", line
                )
            elif not line.strip():
                continue
            else:
                values = _parse(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
            yield _row(name, number, size, columns, values)


def _lines(file: io.BufferedReader) -> Iterator[tuple[bytes, int]]:
    """Each line, or the beginning of one that is too long, with its bytes, its end not counted."""
    while line := file.readline(LONGEST_LINE + 1):
        size, part = len(line), line
        while not part.endswith(b"\n") and (part := file.readline(READ_BYTES)):
            size += len(part)
        yield line.rstrip(b"\r\n"), size - part.endswith(b"\n")


def _parse(line: bytes) -> dict[str, Any] | SampleError:
    try:
        values = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return SampleError("not_utf8", str(error), line)
    except (ValueError, RecursionError) as error:
        return SampleError("malformed_row", f"not JSON: {error}", line)
    return values if isinstance(values, dict) else SampleError("malformed_row", f"a {type(values).__name__}, not an object", line)


def _parquet_rows(path: Path, name: str, columns: Columns) -> Iterator[CorpusRow]:
    with pq.ParquetFile(path, buffer_size=COLUMN_BYTES) as file:
        wanted = [column for column in (columns.text, columns.key) if column is not None]
        absent = [column for column in wanted if column not in file.schema_arrow.names]
        if absent:
            raise SampleError("missing_column", f"{absent[0]} is not among its columns {', '.join(file.schema_arrow.names)}")
        number = 0
        for batch in file.iter_batches(BATCH_ROWS, columns=wanted):
            for row in zip(*(_values(batch.column(column)) for column in wanted), strict=True):
                number += 1
                values = dict(zip(wanted, row, strict=True))
                text = values[columns.text]
                yield _row(name, number, len(text.encode()) if isinstance(text, str) else 0, columns, values)


def _values(column: Any) -> Iterator[str | int | SampleError | None]:
    """The values of a Parquet column, as far as it is one of strings or integers."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        for data in column.cast(pa.large_binary()).to_pylist():  # not every writer checks that strings are UTF-8
            yield None if data is None else _decoded(data)
    elif pa.types.is_integer(kind):
        yield from column.to_pylist()
    else:
        for is_null in column.is_null().to_pylist():
            yield None if is_null else SampleError("wrong_type", f"a {kind}, not a string")


def _decoded(data: bytes) -> str | SampleError:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return SampleError("not_utf8", str(error), data)


def _row(file: str, number: int, size: int, columns: Columns, values: dict[str, Any] | SampleError) -> CorpusRow:
    key = f"{file}:{number}"
    if isinstance(values, SampleError):
        return CorpusRow(file, number, size, key, values)
    text = _text(values.get(columns.text))
    if columns.key is not None:
        named = _key(values.get(columns.key))
        if isinstance(named, SampleError):
            text = named
        else:
            key = named
    return CorpusRow(file, number, size, key, text)


def _text(value: Any) -> str | SampleError:
    if isinstance(value, SampleError):
        return value
    if value is None:
        return SampleError("missing_text", "the row has no text")
    if not isinstance(value, str):
        return SampleError("wrong_type", f"the text is a {type(value).__name__}, not a string")
    if not value.strip():
        return SampleError("empty_text", "the text has no visible character")
    if not _is_unicode(value):
        return SampleError("lone_surrogate", "the text has half of a surrogate pair, which is no character")
    return value


def _key(value: Any) -> str | SampleError:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        return SampleError("malformed_key", f"the key is {str(value)[:40]!r}, neither a string nor an integer")
    key = str(value)
    return key if _is_unicode(key) else SampleError("malformed_key", "the key has half of a surrogate pair, which is no character")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
