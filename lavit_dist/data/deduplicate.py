"""An id set without the images that are copies of others, in it or in other sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lavit_dist.data.captions import caption_groups
from lavit_dist.data.duplicates import LARGEST_DISTANCE, find_copies
from lavit_dist.data.id_batches import join_batches
from lavit_dist.data.id_folder import IdFolder
from lavit_dist.data.id_shard import IdShard, ShardRecord, quarantine_path
from lavit_dist.data.id_shard_writer import commit_batch
from lavit_dist.data.id_shards import IdShards
from lavit_dist.data.manifest import Manifest, load_manifest, write_manifest
from lavit_dist.data.quarantine import read_quarantine
from lavit_dist.errors import check
from lavit_dist.files import new_folder

DUPLICATE = "duplicate"
"""What samples that were left out as copies are counted under, among the filtered."""


def deduplicate(source: Manifest, output: Path, *, max_distance: int, against: Sequence[Manifest] = ()) -> Manifest:
    """Writes the local set `source` to the new folder `output`, shard by shard, without copies of earlier images or of any in `against`.

    Copies are images whose perceptual hashes differ in at most `max_distance` of 64 bits. Documents without an image stay. Raises
    `UserError` for another distance than 0 to `LARGEST_DISTANCE`, and when nothing would be left.
    """
    check(
        0 <= max_distance <= LARGEST_DISTANCE,
        f"--max-distance {max_distance} must lie between 0 and {LARGEST_DISTANCE}, of 64 bits: beyond, unlike pictures count as one.",
    )
    shards = IdShards(source)
    earlier = [_images(shard)[1] for manifest in against for shard in IdShards(manifest)]
    found = [_images(shard) for shard in shards]
    hashes = [*earlier, *(hashes for _, hashes in found)]
    copies = find_copies(np.concatenate(hashes), max_distance, staying=sum(map(len, earlier)))
    of_shards = np.split(copies, np.cumsum([len(each) for each in hashes]))[len(earlier) :]
    with new_folder(output) as folder:
        records = [
            _write(IdFolder.of(folder, {}), Path(source.folder), record, shard, groups[copy])
            for record, shard, (groups, _), copy in zip(source.shards, shards, found, of_shards, strict=False)
        ]
        write_manifest(folder, records)
    return load_manifest(output)


def _images(shard: IdShard) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """The groups of a shard's documents that have an image, see `caption_groups`, and the hash of each."""
    column = shard.batch.column("image_hash")
    has_image = np.asarray(pc.is_valid(column))
    groups, first = np.unique(caption_groups(shard)[has_image], return_index=True)
    return groups, column.drop_null().to_numpy()[first]


def _write(target: IdFolder, source: Path, record: ShardRecord, shard: IdShard, dropped: NDArray[np.int64]) -> ShardRecord:
    """Writes a shard of the folder `source` without the groups `dropped`."""
    stays = np.isin(caption_groups(shard), dropped, invert=True)
    outcomes = record.outcomes
    if len(dropped):
        before = outcomes.filtered.get(DUPLICATE, 0)
        outcomes = dataclasses.replace(outcomes, filtered=outcomes.filtered | {DUPLICATE: before + len(dropped)})
    return commit_batch(
        target,
        record.name,
        join_batches([shard.batch.filter(pa.array(stays))]),
        encoding=record.encoding,
        inputs=record.inputs,
        outcomes=outcomes,
        quarantined=read_quarantine(quarantine_path(source / record.name)),
    )
