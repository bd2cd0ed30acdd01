"""Whether a shard holds what its record says."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lavit_dist.data.id_shard import IMAGE, IdShard, ShardRecord, is_intact
from lavit_dist.data.id_shard_writer import describe_documents
from lavit_dist.data.manifest import MANIFEST
from lavit_dist.errors import UserError


def shard_flaw(path: Path, record: ShardRecord) -> str | None:
    """What is wrong with the Arrow file at `path`, in words: its digest, then what it holds beside what `record` counts.

    Where all documents are pairs, the samples that were used are its images.
    """
    if not is_intact(path, record):
        return f"its sha256 differs from {MANIFEST}"
    try:
        shard = IdShard(path)
    except UserError as error:
        return str(error)
    for name, found in describe_documents(shard.batch).items():
        if found != getattr(record, name):
            return f"it holds {name} {found}, {MANIFEST} says {getattr(record, name)}"
    if _holds_pairs(shard) and record.outcomes.used != record.images:
        return f"it has {record.images} images, but {record.outcomes.used} of its samples were used by outcomes in {MANIFEST}"
    return None


def _holds_pairs(shard: IdShard) -> bool:
    """Whether every document is one image and one text."""
    images = shard.per_document(shard.segment_kinds == IMAGE)
    return bool((np.diff(shard.segment_starts) == 2).all() and (images == 1).all())
