"""The columns of id shards cut and joined as they are, without a look at what they hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

OFFSET_BYTES = 4
"""What Arrow keeps per value of a column whose values differ in length."""


def join_batches(batches: Sequence[Any]) -> Any:
    """One record batch of the documents of several, as `to_batch` would make it of them: the same documents give the same bytes."""
    schema = batches[0].schema
    columns = []
    for name, kind in zip(schema.names, schema.types, strict=True):
        parts = [batch.column(name) for batch in batches]
        if pa.types.is_dictionary(kind):  # each part has a dictionary of its own; the new one is in the order of the documents
            columns.append(pa.concat_arrays([part.cast(kind.value_type) for part in parts]).dictionary_encode())
        else:
            columns.append(pa.concat_arrays(parts))
    return pa.record_batch(columns, schema=schema)


def document_bytes(batch: Any) -> NDArray[np.int64]:
    """Bytes that each document takes in an Arrow file, [document]; what a file has once, such as names of tars, is left out."""
    total = np.zeros(batch.num_rows, np.int64)
    for column in batch.columns:
        total += _value_bytes(column)
    return total


def _value_bytes(column: Any) -> Any:
    kind = column.type
    if pa.types.is_dictionary(kind):
        return kind.index_type.bit_width // 8
    if pa.types.is_list(kind):
        return OFFSET_BYTES + pc.list_value_length(column).to_numpy() * (kind.value_type.bit_width // 8)
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        return OFFSET_BYTES + pc.binary_length(column).to_numpy()
    if isinstance(kind, pa.FixedShapeTensorType):
        return math.prod(kind.shape) * (kind.value_type.bit_width // 8)
    return kind.bit_width // 8
