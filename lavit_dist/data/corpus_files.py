"""The files of a text corpus, at hand on a local disk wherever they lie, and their rows cut into pieces that make a shard each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from lavit_dist.data.corpus_rows import FORMATS, Columns, CorpusRow, read_rows
from lavit_dist.data.fetch import fetch, size_flaw
from lavit_dist.data.quarantine import Quarantined, SampleError
from lavit_dist.data.shard_list import MISSING, FileKind, Shard, list_files
from lavit_dist.errors import check

CORPUS = FileKind("corpus", "file", FORMATS)
STAGE = "read_corpus"
FETCH_ATTEMPTS = 4
ROW_BYTES = 256
"""What a row counts beside its own bytes when pieces are cut: it takes that much in memory and in the columns, so short rows count too."""


def list_corpus(sources: str | Sequence[str], storage_options: Mapping[str, Any]) -> list[Shard]:
    """The files that `corpus` names, by name. Raises `UserError` as `list_files` does, and for one that is missing or no corpus."""
    files = list_files(sources, storage_options, CORPUS)
    for file in files:
        check(file.size != MISSING, f"corpus names {file.path}, which does not exist; check the name.")
        check(
            CORPUS.takes(file.name), f"corpus names {file.path}, which is none of {', '.join(FORMATS)}; name files of these kinds."
        )
    return files


@contextmanager
def at_hand(file: Shard, folder: Path) -> Iterator[Path]:
    """The file on a local disk: where it lies, or a copy in `folder` as long as the block lasts. Raises `FetchError` when it can't be had."""
    if file.file_system is None:
        yield Path(file.path)
        return
    with TemporaryDirectory(dir=folder) as own:
        target = Path(own) / PurePosixPath(file.path).name
        fetch(file.file_system, file.path, target, attempts=FETCH_ATTEMPTS, first_wait=1.0, flaw=size_flaw(file.size))
        yield target


@dataclass
class Piece:
    """Consecutive rows of a corpus, and the files that couldn't be read on among them."""

    rows: list[CorpusRow] = field(default_factory=list)
    damaged: list[Quarantined] = field(default_factory=list)


def read_pieces(files: Iterable[tuple[str, Path]], columns: Columns, bytes_per_piece: int) -> Iterator[Piece]:
    """The rows of `files`, names and where they lie, in order, in pieces that end with the row that reaches `bytes_per_piece`.

    There is at least one piece. Where pieces end depends on the files alone. Memory holds one piece.
    """
    piece, size, count = Piece(), 0, 0
    for name, path in files:
        try:
            for row in read_rows(path, name, columns):
                piece.rows.append(row)
                size += row.size + ROW_BYTES
                if size >= bytes_per_piece:
                    yield piece
                    piece, size, count = Piece(), 0, count + 1
        except SampleError as error:
            piece.damaged.append(Quarantined.of(name, STAGE, error))
    if piece.rows or piece.damaged or not count:
        yield piece
