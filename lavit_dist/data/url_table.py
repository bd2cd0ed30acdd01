"""Metadata of pictures on the web, in Parquet files as LAION publishes them, cut into shards of consecutive rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lavit_dist.errors import UserError, check

ROWS_AT_A_TIME = 1 << 16
TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_dictionary, pa.types.is_null)


@dataclass(frozen=True)
class UrlFile:
    """One Parquet file."""

    path: Path
    rows: int
    size: int
    """Bytes."""


class UrlTable:
    """The rows of all files in the order of their names; shard s has the rows [s, s + 1) x `samples_per_shard`, whatever file they lie in."""

    def __init__(
        self, source: str, url_column: str, caption_column: str, columns: tuple[str, ...] | None, samples_per_shard: int
    ) -> None:
        """Reads footers only. `columns` names further ones to carry; None takes all of the first file.

        Raises `UserError` when `source` names no Parquet file, one is unreadable, a column isn't there or its values are no text.
        """
        paths = _list_files(source)
        schemas = {path: _read_schema(path) for path in paths}
        self.url_column, self.caption_column = url_column, caption_column
        if columns is None:
            columns = tuple(name for name in schemas[paths[0]].names if name not in (url_column, caption_column))
        self.columns = columns
        for path, schema in schemas.items():
            self._check_columns(path, schema)
        self._check_types(schemas)
        self.files = [UrlFile(path, pq.read_metadata(path).num_rows, path.stat().st_size) for path in paths]
        self.samples_per_shard = samples_per_shard
        check(len(self) > 0, f"metadata {source} holds no rows; name files that do.")

    def __len__(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def shards(self) -> int:
        """How many shards the rows make; the last may be shorter."""
        return -(-len(self) // self.samples_per_shard)

    def state(self) -> list[dict[str, Any]]:
        """What tells whether the files are the same: their names, numbers of rows and sizes."""
        return [{"name": file.path.name, "rows": file.rows, "size": file.size} for file in self.files]

    def read_shards(self, wanted: Collection[int]) -> Iterator[tuple[int, pa.Table]]:
        """The rows of each shard in `wanted`, ascending. Row groups of which nothing is wanted aren't read.

        A table has `row` (int64, counted over all files), `url` and `caption` (text or null) and `metadata`, a struct of the further columns.
        """
        wanted = frozenset(wanted)
        size, parts = self.samples_per_shard, list[pa.Table]()
        for first, batch in self._batches(wanted):
            last = first + len(batch)
            for shard in range(first // size, -(-last // size)):
                if shard not in wanted:
                    continue
                begin, end = max(first, shard * size), min(last, (shard + 1) * size)
                parts.append(self._rows(batch.slice(begin - first, end - begin), begin))
                if end == min((shard + 1) * size, len(self)):
                    yield shard, pa.concat_tables(parts, promote_options="permissive").combine_chunks()
                    parts = []

    def _batches(self, wanted: frozenset[int]) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Batches of the files' own columns, each with the number of its first row."""
        names = [self.url_column, self.caption_column, *self.columns]
        first = 0
        for entry in self.files:
            with pq.ParquetFile(entry.path) as file:
                for group in range(file.num_row_groups):
                    after = first + file.metadata.row_group(group).num_rows
                    shards = range(first // self.samples_per_shard, -(-after // self.samples_per_shard))
                    if not wanted.isdisjoint(shards):
                        for batch in file.iter_batches(ROWS_AT_A_TIME, row_groups=[group], columns=names):
                            yield first, batch
                            first += len(batch)
                    first = after

    def _rows(self, batch: pa.RecordBatch, first: int) -> pa.Table:
        carried = [batch.column(name) for name in self.columns]
        metadata = pa.StructArray.from_arrays(carried, self.columns) if carried else pa.array([{}] * len(batch), pa.struct([]))
        return pa.table(
            {
                "row": pa.array(range(first, first + len(batch)), pa.int64()),
                "url": batch.column(self.url_column).cast(pa.string()),
                "caption": batch.column(self.caption_column).cast(pa.string()),
                "metadata": metadata,
            }
        )

    def _check_columns(self, path: Path, schema: pa.Schema) -> None:
        named = {"url_column": self.url_column, "caption_column": self.caption_column}
        for setting, name in [*named.items(), *(("columns", name) for name in self.columns)]:
            check(
                schema.names.count(name) == 1,
                f"{setting} {name!r} is not one column of {path}; its columns are {', '.join(schema.names) or 'none'}.",
            )
        for setting, name in named.items():
            found = schema.field(name).type
            check(
                any(is_text(found) for is_text in TEXT_TYPES),
                f"{setting} {name!r} of {path} holds values of type {found}; name a column of text.",
            )

    def _check_types(self, schemas: Mapping[Path, pa.Schema]) -> None:
        """A column may be of whole numbers here and of others there, or empty, but not of text here and of numbers there."""
        carried = {path: pa.schema([schema.field(name) for name in self.columns]) for path, schema in schemas.items()}
        try:
            pa.unify_schemas(list(carried.values()), promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise UserError(
                f"The files of metadata don't agree on the types of a column ({' '.join(str(error).split())}); name others in `columns`."
            ) from error


def _list_files(source: str) -> list[Path]:
    check("://" not in source, f"metadata {source} is an address; copy its files to a disk and name their folder.")
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    found = path.glob("*.parquet") if path.is_dir() else Path(path.anchor).glob(str(path.relative_to(path.anchor)))
    files = sorted(file for file in found if file.is_file())
    check(
        bool(files),
        f"metadata {source} names no Parquet file; give a .parquet file, a folder of them, or a pattern such as DIR/*.parquet.",
    )
    names = [file.name for file in files]
    check(len(set(names)) == len(names), f"metadata {source} names several files called alike; give each a name of its own.")
    return files


def _read_schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} can't be read as Parquet ({' '.join(str(error).split())}); replace or remove it.") from error
