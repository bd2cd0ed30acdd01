"""Writing id shards: what was quarantined, the Arrow file, and last the sidecar, which commits both."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lavit_dist.data.hashing import stable_hash
from lavit_dist.data.id_folder import IdFolder
from lavit_dist.data.id_shard import (
    IMAGE,
    TEXT,
    Encoding,
    IdDocument,
    IdShardHead,
    InputFile,
    Lengths,
    Outcomes,
    ShardRecord,
    quarantine_path,
    sidecar_path,
)
from lavit_dist.data.quarantine import Quarantined, quarantine_lines

LARGEST_UINT16 = 2**16 - 1


def write_id_shard(
    path: Path,
    documents: Sequence[IdDocument],
    *,
    encoding: Encoding,
    inputs: Iterable[InputFile],
    outcomes: Outcomes | None = None,
) -> ShardRecord:
    """Writes the Arrow file at `path`, then its sidecar. The same documents give the same bytes.

    Without `outcomes` each (tar, key) of `documents` is a sample, and there were no others.
    """
    batch = to_batch(documents, encoding)
    outcomes = outcomes or Outcomes(count_samples(batch))
    return commit_batch(IdFolder.of(path.parent, {}), path.name, batch, encoding=encoding, inputs=inputs, outcomes=outcomes)


def commit_batch(
    folder: IdFolder,
    name: str,
    batch: Any,
    *,
    encoding: Encoding,
    inputs: Iterable[InputFile],
    outcomes: Outcomes,
    quarantined: Iterable[Quarantined] | None = None,
) -> ShardRecord:
    """Writes what was quarantined, if that is given, then the documents of `batch` as the Arrow file `name`, and last its sidecar."""
    content = _to_arrow(batch)
    record = ShardRecord(
        name=name,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        outcomes=outcomes,
        inputs=tuple(inputs),
        encoding=encoding,
        **describe_documents(batch),
    )
    folder.remove(sidecar_path(Path(name)).name)  # from here until the end the shard is not committed
    if quarantined is not None:
        folder.write(quarantine_path(Path(name)).name, quarantine_lines(quarantined))
    folder.write(name, content)
    write_record(folder, record)
    return record


def write_record(folder: IdFolder, record: ShardRecord) -> None:
    """Writes the sidecar of a shard, which commits it."""
    folder.write(sidecar_path(Path(record.name)).name, json.dumps(dataclasses.asdict(record), indent=1).encode())


def to_batch(documents: Sequence[IdDocument], encoding: Encoding) -> Any:
    """Documents as a record batch with the columns of a shard."""
    batch = pa.RecordBatch.from_pylist([_row(document) for document in documents], schema=_schema(encoding))
    return batch if encoding.latents is None else _with_latents(batch, documents, encoding.latents.shape)


def describe_documents(batch: Any) -> dict[str, Any]:
    """The fields of a record that its documents decide."""
    head = IdShardHead(batch)
    has_image = pa.array(head.per_document(head.segment_kinds == IMAGE) > 0)
    return {
        "documents": batch.num_rows,
        "images": _count_different(batch, "source_offset", has_image),
        "code_lengths": _lengths(head, IMAGE),
        "text_lengths": _lengths(head, TEXT),
    }


def count_samples(batch: Any) -> int:
    """How many (tar, key) the documents of a record batch were made from."""
    return _count_different(batch, "key", pa.array(np.ones(batch.num_rows, np.bool_)))


def _schema(encoding: Encoding) -> Any:
    largest = max(encoding.text_vocab_size, encoding.codebook_size) - 1
    id_type = pa.uint16() if largest <= LARGEST_UINT16 else pa.uint32()
    return pa.schema(
        {
            "key": pa.string(),
            "caption_index": pa.uint16(),
            "document_hash": pa.uint64(),
            "segment_kinds": pa.list_(pa.uint8()),
            "segment_lengths": pa.list_(pa.uint32()),
            "ids": pa.list_(id_type),
            "keep_mask": pa.binary(),
            "caption": pa.string(),
            "source_shard": pa.dictionary(pa.int32(), pa.string()),
            "source_offset": pa.int64(),
            "source_size": pa.int64(),
            "scores": pa.string(),
            "image_hash": pa.uint64(),
        }
    )


def _with_latents(batch: Any, documents: Sequence[IdDocument], shape: tuple[int, int, int]) -> Any:
    """The batch with one column more, a tensor per document."""
    latents = [document.latents for document in documents if document.latents is not None]
    assert len(latents) == len(documents)
    flat = pa.array(np.concatenate([each.reshape(-1) for each in latents]) if latents else np.empty(0, np.float16))
    kind = pa.fixed_shape_tensor(flat.type, shape)
    column = pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(flat, type=kind.storage_type))
    return pa.record_batch([*batch.columns, column], schema=batch.schema.append(pa.field("latents", kind)))


def _to_arrow(batch: Any) -> bytes:
    """The content of a shard's file."""
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, batch.schema) as writer:
        writer.write_batch(batch)
    return buffer.getvalue()


def _row(document: IdDocument) -> dict[str, Any]:
    shard, offset, size = document.source
    return {
        "key": document.key,
        "caption_index": document.caption_index,
        "document_hash": stable_hash(document.key, document.caption_index),
        "segment_kinds": [kind for kind, _ in document.segments],
        "segment_lengths": [len(ids) for _, ids in document.segments],
        "ids": np.concatenate([np.asarray(ids, np.int64) for _, ids in document.segments]),
        "keep_mask": document.keep_mask,
        "caption": document.caption,
        "source_shard": shard,
        "source_offset": offset,
        "source_size": size,
        "scores": json.dumps(document.scores, sort_keys=True),
        "image_hash": document.image_hash,
    }


def _count_different(batch: Any, name: str, among: Any) -> int:
    """How many different (tar, value in the column `name`) the documents have that the truths `among` mark."""
    table = pa.table({"tar": batch.column("source_shard").indices, name: batch.column(name)})
    return int(table.filter(among).group_by(["tar", name]).aggregate([]).num_rows)


def _lengths(head: IdShardHead, kind: int) -> Lengths:
    lengths = head.segment_lengths[head.segment_kinds == kind]
    if not len(lengths):
        return Lengths(0, 0.0, 0)
    return Lengths(int(lengths.min()), int(lengths.sum(dtype=np.int64)) / len(lengths), int(lengths.max()))
