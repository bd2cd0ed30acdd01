"""An id shard: one uncompressed Arrow IPC file of tokenized documents, and a JSON sidecar, written last, that commits it.

Ids are raw: text ids as the text tokenizer gives them, codes 0..K-1. What depends on the language model (offsets, [IMG], the order of
image and text, EOS) is added when the shard is read for training. A file holds one record batch, so that each column is one array.
"""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from lavit_dist import __version__
from lavit_dist.data.id_folder import IdFolder
from lavit_dist.errors import UserError
from lavit_dist.files import sha256

TEXT, IMAGE = 0, 1
"""Kinds of segments."""


@dataclass(frozen=True)
class IdDocument:
    """One tokenized document."""

    key: str
    """The key of the pair, or of the row of a corpus, that it was made from."""
    caption_index: int
    """Which of the pair's captions it holds."""
    segments: Sequence[tuple[int, Sequence[int] | NDArray[np.integer]]]
    """(`TEXT` or `IMAGE`, raw ids) in order."""
    keep_mask: bytes
    """One bit per patch of each image, row-major, first patch in the highest bit; an image starts on a byte."""
    caption: str
    """The words of a pair; empty in a document of text alone, whose row they would only double."""
    source: tuple[str, int, int]
    """The image's bytes: tar name, offset, size. Of a document of text alone: file name, row (from 1), bytes of the row."""
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Numbers that came with the pair, such as a similarity."""
    image_hash: int | None = None
    """`perceptual_hash` of the image, by which copies of it are found; None in a document of text alone."""
    latents: NDArray[np.float16] | None = None
    """What the pixel decoder learns to paint, [channel, height, width], in a set that has latents."""


@dataclass(frozen=True)
class LatentEncoding:
    """What turned images into the latents that documents carry beside their codes."""

    source: str
    """Digest of what decides them: the weights of the autoencoder's encoder, and the factor that scales them."""
    shape: tuple[int, int, int]
    """Channels, height and width."""


@dataclass(frozen=True)
class Encoding:
    """What turned pairs or texts into ids; shards of one set must agree in all of it."""

    visual_tokenizer: str | None
    """Digest of the visual tokenizer's configuration and weights; None in a set of text alone."""
    text_tokenizer: str | None
    """`TextTokenizer.digest`; None in a set of images alone."""
    preprocessing: str | None
    """Digest of how bytes become pixels; None in a set of text alone."""
    settings: str
    """Digest of the settings that decide ids, such as the seed of the selection noise."""
    text_vocab_size: int
    """Number of text ids, T; 0 in a set of images alone."""
    codebook_size: int
    """Number of visual codes, K; 0 in a set of text alone."""
    latents: LatentEncoding | None = None
    """None where documents have no latents."""

    @property
    def has_images(self) -> bool:
        """Whether documents may hold images; a set of text alone goes with any visual tokenizer."""
        return self.visual_tokenizer is not None


@dataclass(frozen=True)
class InputFile:
    """A tar, or a file of a text corpus, that was read."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Lengths:
    """Ids per segment of one kind."""

    min: int
    mean: float
    max: int


@dataclass(frozen=True)
class Outcomes:
    """What became of the samples in a shard's inputs: each was used, refused or left out."""

    samples: int
    """Samples found, whatever became of them."""
    quarantined: dict[str, int] = dataclasses.field(default_factory=dict)
    """Samples that can't be used, per reason."""
    filtered: dict[str, int] = dataclasses.field(default_factory=dict)
    """Samples that could be used but were not wanted, per rule."""
    damaged_inputs: dict[str, int] = dataclasses.field(default_factory=dict)
    """Inputs that couldn't be read to their end, per reason; what they lost is in no other count."""

    @property
    def used(self) -> int:
        """Samples that became documents."""
        return self.samples - sum(self.quarantined.values()) - sum(self.filtered.values())


@dataclass(frozen=True)
class ShardRecord:
    """The sidecar of a shard, and its entry in the manifest."""

    name: str
    """File name of the Arrow file."""
    size: int
    """Bytes of the Arrow file."""
    sha256: str
    """Digest of the Arrow file."""
    documents: int
    images: int
    outcomes: Outcomes
    inputs: tuple[InputFile, ...]
    encoding: Encoding
    code_lengths: Lengths
    text_lengths: Lengths
    program_version: str = __version__


def sidecar_path(path: Path) -> Path:
    """The sidecar of the Arrow file at `path`."""
    return path.with_suffix(".json")


def quarantine_path(path: Path) -> Path:
    """Where the samples are told that the inputs of the Arrow file at `path` had and that can't be used."""
    return path.with_suffix(".quarantine.jsonl")


def read_record(path: Path) -> ShardRecord | None:
    """The sidecar of the Arrow file at `path`; None when it is absent or not a sidecar, that is, the shard was never committed."""
    return find_record(IdFolder.of(path.parent, {}), path.name)


def find_record(folder: IdFolder, name: str) -> ShardRecord | None:
    """`read_record` of the Arrow file `name` in `folder`."""
    try:
        return TypeAdapter(ShardRecord).validate_json(folder.read(sidecar_path(Path(name)).name))
    except (FileNotFoundError, ValidationError):
        return None


def is_intact(path: Path, record: ShardRecord) -> bool:
    """Whether the Arrow file at `path` is the one that `record` describes."""
    return path.exists() and path.stat().st_size == record.size and sha256(path) == record.sha256


class IdShardHead:
    """What packing needs to know of the documents of a shard, without their ids."""

    COLUMNS = ("document_hash", "segment_kinds", "segment_lengths", "caption_index", "source_shard", "source_offset")

    def __init__(self, batch: Any) -> None:
        """`batch` is the record batch of a shard, or one that has these columns alone."""
        self.batch = batch
        self.document_hash: NDArray[np.uint64] = batch.column("document_hash").to_numpy()
        self.segment_kinds, self.segment_starts = self._lists("segment_kinds")
        self.segment_lengths, _ = self._lists("segment_lengths")

    @classmethod
    def read(cls, file: Any, name: str) -> IdShardHead:
        """Reads these columns alone out of an open shard. Raises `UserError` when it is none."""
        with _readable(name):
            fields = [place for place, field in enumerate(pa.ipc.open_file(file).schema) if field.name in cls.COLUMNS]
            file.seek(0)
            return cls(pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=fields)).get_batch(0))

    def __len__(self) -> int:
        return len(self.document_hash)

    @property
    def caption_index(self) -> NDArray[np.uint16]:
        """Which of the captions of its pair each document holds."""
        indices: NDArray[np.uint16] = self.batch.column("caption_index").to_numpy()
        return indices

    @property
    def source(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Where the image of each document lies: a number that stands for the tar, and the offset in it."""
        return self.batch.column("source_shard").indices.to_numpy(), self.batch.column("source_offset").to_numpy()

    def per_document(self, values: NDArray[Any]) -> NDArray[np.int64]:
        """Sums over the segments of each document, [document], of whole numbers or truths that each segment has, [segment]."""
        owner = np.repeat(np.arange(len(self)), np.diff(self.segment_starts))
        return np.bincount(owner, weights=values, minlength=len(self)).astype(np.int64)

    def _lists(self, name: str) -> tuple[NDArray[Any], NDArray[np.int32]]:
        column = self.batch.column(name)
        return column.values.to_numpy(), column.offsets.to_numpy()


class IdShard(IdShardHead):
    """A committed shard, memory-mapped: the columns that training needs, as arrays without a copy."""

    def __init__(self, path: Path, content: mmap.mmap | None = None) -> None:
        """`content` is the file at `path` where the caller has mapped it already; the arrays keep it alive."""
        with _readable(path):
            source = pa.memory_map(str(path)) if content is None else pa.BufferReader(pa.py_buffer(content))
            super().__init__(pa.ipc.open_file(source).get_batch(0))
            self.ids, self.id_starts = self._lists("ids")

    @property
    def latents(self) -> NDArray[np.float16]:
        """[document, channel, height, width], of a set that has latents."""
        tensors: NDArray[np.float16] = self.batch.column("latents").to_numpy_ndarray()
        return tensors

    def column(self, name: str) -> list[Any]:
        """A whole column as Python values, for looking at."""
        values: list[Any] = self.batch.column(name).to_pylist()
        return values

    def value(self, name: str, document: int) -> Any:
        """What a column has of one document, as a Python value."""
        return self.batch.column(name)[document].as_py()

    def segments(self, document: int) -> list[tuple[int, NDArray[np.integer]]]:
        """(`TEXT` or `IMAGE`, raw ids) of each segment of a document, in order."""
        segments = []
        start = self.id_starts[document]
        for segment in range(self.segment_starts[document], self.segment_starts[document + 1]):
            end = start + self.segment_lengths[segment]
            segments.append((int(self.segment_kinds[segment]), self.ids[start:end]))
            start = end
        return segments


@contextmanager
def _readable(name: Path | str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise UserError(
            f"The id shard {name} can't be read ({error}); remove it and run what made the set again, which redoes it alone."
        ) from error
