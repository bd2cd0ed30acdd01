"""The tensors of one forward pass: rows of whole documents, laid end to end and padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lavit_dist.models.vocabulary import Vocabulary

PADDING_DOCUMENT = -1
"""`document_ids` of padding: it attends to itself alone, and nothing to it."""
UNSUPERVISED_LABEL = 0
"""Label where the loss weight is 0: a legal id, so that every cross-entropy takes it."""


class ModalityWeights(NamedTuple):
    """What a token with a loss weighs, before all weights are scaled to sum to 1."""

    text: float = 1.0
    """Of text ids, [IMG] and EOS."""
    image: float = 1.0
    """Of visual codes and [/IMG]."""


EQUAL_WEIGHTS = ModalityWeights()


@dataclass(frozen=True)
class MicroBatch:
    """Rows for one forward pass, each tensor [row, position]."""

    tokens: Tensor
    """int64; padding holds the EOS id."""
    labels: Tensor
    """int64, the next token of the same document; `UNSUPERVISED_LABEL` where there is none."""
    position_ids: Tensor
    """int64, from 0 in each document and in the padding."""
    document_ids: Tensor
    """int32, from 0 in each row; `PADDING_DOCUMENT` for padding."""
    modality: Tensor
    """uint8, of the label: 1 for visual codes and [/IMG], 0 for text, [IMG] and EOS."""
    loss_weight: Tensor
    """float32; sums to 1 over the global batch, 0 where there is no label."""


def lay_out(
    rows: list[list[NDArray[np.int64]]],
    *,
    vocabulary: Vocabulary,
    eos_id: int,
    seq_len: int,
    weight: float,
    modality_weights: ModalityWeights = EQUAL_WEIGHTS,
    given: Sequence[Sequence[int]] | None = None,
) -> MicroBatch:
    """Lays the documents of each row end to end. A label weighs `weight` times what its modality does.

    `given` says for each document how many of its first tokens are no label anywhere: its first one at least, and by default that alone.
    """
    shape = (len(rows), seq_len)
    tokens = np.full(shape, eos_id, np.int64)
    labels = np.full(shape, UNSUPERVISED_LABEL, np.int64)
    position_ids = np.zeros(shape, np.int64)
    document_ids = np.full(shape, PADDING_DOCUMENT, np.int32)
    loss_weight = np.zeros(shape, np.float32)
    positions = np.arange(seq_len)
    for row, documents in enumerate(rows):
        start = 0
        for number, document in enumerate(documents):
            end = start + len(document)
            tokens[row, start:end] = document
            labels[row, start : end - 1] = document[1:]
            position_ids[row, start:end] = positions[: len(document)]
            document_ids[row, start:end] = number
            first_label = given[row][number] if given is not None else 1
            loss_weight[row, start + first_label - 1 : end - 1] = weight
            start = end
        position_ids[row, start:] = positions[: seq_len - start]
    modality = (labels > vocabulary.image_start).astype(np.uint8)
    loss_weight *= np.array(modality_weights, np.float32)[modality]
    labels[loss_weight == 0] = UNSUPERVISED_LABEL
    modality[loss_weight == 0] = 0
    arrays = (tokens, labels, position_ids, document_ids, modality, loss_weight)
    return MicroBatch(*(torch.from_numpy(array) for array in arrays))
