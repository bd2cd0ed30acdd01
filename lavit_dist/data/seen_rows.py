"""A packed row as training sees it: read out of the tensors of its micro-batch, with where each document comes from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from lavit_dist.data.global_batches import GlobalBatches
from lavit_dist.data.id_shard import IMAGE, TEXT
from lavit_dist.data.micro_batch import PADDING_DOCUMENT
from lavit_dist.data.rows import RowDataset
from lavit_dist.data.spans import Spans
from lavit_dist.data.tar_reader import FileLocation
from lavit_dist.models.vocabulary import Vocabulary


class Slot(IntEnum):
    """What a position of a row holds."""

    TEXT = 0
    IMAGE_MARK = 1
    """[IMG] or [/IMG]."""
    CODE = 2
    EOS = 3
    PADDING = 4


class Loss(IntEnum):
    """What is learned at a position: the token that comes next."""

    NONE = 0
    TEXT = 1
    IMAGE = 2


@dataclass(frozen=True)
class SeenDocument:
    """A document of a row, or a piece of one that is longer than a row."""

    key: str
    shard: str
    """File name of the id shard."""
    index: int
    """Its place in the shard."""
    image: FileLocation | None
    """Where the image's bytes lie, `shard` being the tar's name alone; None for a document without one."""
    order: tuple[str, ...]
    """`image` and `text` as they follow one another in the tokens."""
    drops_caption: bool
    """Whether it has a caption, which this epoch leaves out."""
    first_token: int
    """Place of the first token in the whole document: above 0 for a later piece."""
    tokens: NDArray[np.int64]
    num_supervised: int


@dataclass(frozen=True)
class SeenRow:
    """One row of the run, columns [position]."""

    row: int
    step: int
    source: str
    """Name of the id set it is of."""
    source_row: int
    """Its number among that set's rows."""
    epoch: int
    """Of that set."""
    document_ids: NDArray[np.int32]
    """The document of each position, from 0; `PADDING_DOCUMENT` for padding."""
    slots: NDArray[np.uint8]
    """Values of `Slot`."""
    losses: NDArray[np.uint8]
    """Values of `Loss`."""
    documents: tuple[SeenDocument, ...]

    @property
    def num_padding(self) -> int:
        return int((self.slots == Slot.PADDING).sum())


def see_row(batches: GlobalBatches, row: int) -> SeenRow:
    """Row `row` of the run, out of the micro-batch that a data-parallel rank would train on if each had one row."""
    size = batches.global_batch_size
    batch = batches.micro_batches(row // size, row % size, size, 1)[0]
    tokens, document_ids = batch.tokens[0].numpy(), batch.document_ids[0].numpy()
    supervised = batch.loss_weight[0].numpy() > 0
    losses = np.where(supervised, np.where(batch.modality[0].numpy(), Loss.IMAGE, Loss.TEXT), Loss.NONE).astype(np.uint8)
    source, source_row = batches.rows.mixture.locate(row)
    dataset = batches.rows.sources[source]
    spans = dataset.row_spans(source_row)
    documents = []
    for number in range(len(spans)):
        mine = document_ids == number
        documents.append(_document(dataset, spans, number, tokens[mine], int(supervised[mine].sum())))
    slots = slot_kinds(tokens, document_ids, batches.rows.vocabulary, batches.rows.eos_id)
    epoch = dataset.locate(source_row)[0]
    return SeenRow(row, row // size, source, source_row, epoch, document_ids, slots, losses, tuple(documents))


def slot_kinds(
    tokens: NDArray[np.int64], document_ids: NDArray[np.int32], vocabulary: Vocabulary, eos_id: int
) -> NDArray[np.uint8]:
    """The `Slot` of each position."""
    kinds = np.full(tokens.shape, Slot.TEXT, np.uint8)
    kinds[tokens >= vocabulary.image_start] = Slot.IMAGE_MARK
    kinds[tokens >= vocabulary.code_offset] = Slot.CODE
    kinds[tokens == eos_id] = Slot.EOS
    kinds[document_ids == PADDING_DOCUMENT] = Slot.PADDING
    return kinds


def _document(dataset: RowDataset, spans: Spans, number: int, tokens: NDArray[np.int64], num_supervised: int) -> SeenDocument:
    shard_number, index = locate_document(dataset, int(spans.documents[number]))
    shard = dataset.shards[shard_number]
    kinds = [kind for kind, ids in shard.segments(index) if kind == IMAGE or len(ids)]
    location = FileLocation(*(shard.value(name, index) for name in ("source_shard", "source_offset", "source_size")))
    is_pair = sorted(kinds) == [TEXT, IMAGE]
    return SeenDocument(
        key=shard.value("key", index),
        shard=dataset.manifest.shards[shard_number].name,
        index=index,
        image=location if IMAGE in kinds else None,
        order=_order(tokens, dataset.vocabulary, dataset.eos_id),
        drops_caption=is_pair and bool(spans.drops_caption[number]),
        first_token=int(spans.starts[number]),
        tokens=tokens,
        num_supervised=num_supervised,
    )


def locate_document(dataset: RowDataset, document: int) -> tuple[int, int]:
    """The shard of a document of the set, and its place in it."""
    shard = int(np.searchsorted(dataset.shard_starts, document, side="right")) - 1
    return shard, document - int(dataset.shard_starts[shard])


def _order(tokens: NDArray[np.int64], vocabulary: Vocabulary, eos_id: int) -> tuple[str, ...]:
    of_content = tokens[tokens != eos_id]
    begins_image = of_content == vocabulary.image_start
    is_text = of_content < vocabulary.image_start
    begins_text = is_text & ~np.concatenate([[False], is_text[:-1]])
    return tuple("image" if begins_image[place] else "text" for place in np.flatnonzero(begins_image | begins_text).tolist())
