"""The same documents in the same order, in shards of another size.

Shards are cut where the image changes, so that the captions of an image stay together, as `caption_groups` needs them. The cuts
depend on the documents and the number of shards alone: whatever the set was cut into before, the Arrow files come out the same.

What was refused or left out belongs to no document, so the refusals of an old shard stay together: its quarantine records, and the
counts of these and of filters, go to the new shard that has its first document (if it has none: the document that comes next, or
the last). The inputs of a new shard are the tars that its documents come from, and all inputs of old shards whose refusals it took.
So a tar may be an input of several shards, each count is exact over the set, and in each shard outcomes still add up.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lavit_dist.data.captions import caption_groups
from lavit_dist.data.id_batches import document_bytes, join_batches
from lavit_dist.data.id_folder import IdFolder
from lavit_dist.data.id_shard import InputFile, Outcomes, ShardRecord, quarantine_path
from lavit_dist.data.id_shard_writer import commit_batch, count_samples
from lavit_dist.data.id_shards import IdShards
from lavit_dist.data.manifest import Manifest, load_manifest, write_manifest
from lavit_dist.data.quarantine import read_quarantine
from lavit_dist.errors import check
from lavit_dist.files import new_folder

LARGEST_SHARD = 2**31 - 1
"""Bytes: Arrow counts within a column in 32 bits."""


@dataclass(frozen=True)
class Piece:
    """Documents `first` to `last` - 1 of shard `shard` of the old set."""

    shard: int
    first: int
    last: int


@dataclass(frozen=True)
class NewShard:
    """What a shard is made of."""

    pieces: tuple[Piece, ...]
    refusals: tuple[int, ...]
    """The old shards whose refusals it takes."""


def reshard(source: Manifest, output: Path, *, num_shards: int | None = None, shard_bytes: float | None = None) -> Manifest:
    """Writes the local set `source` to the new folder `output`, which appears when it is whole. One new shard is in memory at a time.

    Give the number of shards, or their bytes: then there are as few as have no more than that on average. All are of nearly equal
    size. Raises `UserError` when the set can't be cut so, or doesn't say which of two tars of one name its documents come from.
    """
    _check_inputs(source)
    shards = IdShards(source)
    plan = plan_shards(shards, num_shards=num_shards, shard_bytes=shard_bytes)
    with new_folder(output) as folder:
        records = [_write(IdFolder.of(folder, {}), shard_name(number, len(plan)), shards, new) for number, new in enumerate(plan)]
        check_nothing_lost(source.shards, records, f"The id set {source.folder}")
        write_manifest(folder, records)
    return load_manifest(output)


def shard_name(number: int, num_shards: int) -> str:
    """The Arrow file of shard `number`; names sort as numbers do."""
    return f"shard-{number:0{max(5, len(str(num_shards - 1)))}d}.arrow"


def plan_shards(shards: IdShards, *, num_shards: int | None = None, shard_bytes: float | None = None) -> list[NewShard]:
    """What goes where, from lengths alone. Raises `UserError` as `reshard` does."""
    check(num_shards is None or num_shards > 0, f"--shards {num_shards} must be at least 1.")
    check(shard_bytes is None or shard_bytes > 0, f"--shard-mb must be above 0, shards of {shard_bytes} bytes hold nothing.")
    starts = [0, *itertools.accumulate(record.documents for record in shards.manifest.shards)]
    sizes = [int(document_bytes(shard.batch).sum()) for shard in shards]
    total = sum(sizes)
    number = min(num_shards or math.ceil(total / (shard_bytes or total)), starts[-1])
    check(
        total / number < LARGEST_SHARD,
        f"Shards of {total / number / 1e6:.0f} MB are too large for Arrow, which counts in 32 bits; ask for 2000 MB or less.",
    )
    cuts = sorted({0, *_cuts(shards, sizes, number)} - {starts[-1]})
    check(
        num_shards is None or len(cuts) == num_shards,
        f"--shards {num_shards} is too many for the {starts[-1]} documents of {shards.manifest.folder}, of which those of one image"
        " stay together; ask for fewer.",
    )
    return [
        NewShard(
            tuple(_pieces(starts, first, last)),
            tuple(old for old, start in enumerate(starts[:-1]) if first <= min(start, starts[-1] - 1) < last),
        )
        for first, last in itertools.pairwise([*cuts, starts[-1]])
    ]


def check_nothing_lost(old: Iterable[ShardRecord], new: Iterable[ShardRecord], what: str) -> None:
    """Raises `UserError` unless both count the same documents, images and outcomes."""
    before, after = _totals(old), _totals(new)
    differing = [f"{name} {before[name]} before, {after[name]} after" for name in before | after if before[name] != after[name]]
    check(
        not differing,
        f"{what} would not keep its counts ({'; '.join(differing)}), for it has documents of one image in different places; leave it"
        " as it is.",
    )


def _cuts(shards: IdShards, sizes: Sequence[int], number: int) -> Iterator[int]:
    """The first document of each new shard, by its number in the set: the first image that begins at or after the shard's share."""
    total, size_before, documents_before = sum(sizes), 0, 0
    targets = [total * new // number for new in range(number)]
    place = 0
    for shard, size in zip(shards, sizes, strict=True):
        if len(shard):
            begins = np.flatnonzero(np.diff(caption_groups(shard), prepend=-1))
            ends = np.cumsum(document_bytes(shard.batch))
            begin_at = size_before + np.concatenate([[0], ends])[begins]
            while place < number and targets[place] < size_before + size:
                group = int(np.searchsorted(begin_at, targets[place]))
                yield documents_before + (int(begins[group]) if group < len(begins) else len(shard))
                place += 1
        size_before += size
        documents_before += len(shard)


def _pieces(starts: Sequence[int], first: int, last: int) -> Iterator[Piece]:
    """Where documents `first` to `last` - 1 of the set lie; shard i has those from starts[i] on."""
    for shard in range(int(np.searchsorted(starts, first, side="right")) - 1, len(starts) - 1):
        if starts[shard] >= last:
            return
        begin, end = max(first, starts[shard]), min(last, starts[shard + 1])
        if begin < end:
            yield Piece(shard, begin - starts[shard], end - starts[shard])


def _write(folder: IdFolder, name: str, shards: IdShards, new: NewShard) -> ShardRecord:
    """Writes one new shard with its quarantine file and sidecar."""
    batches = [shards[piece.shard].batch.slice(piece.first, piece.last - piece.first) for piece in new.pieces]
    batch = join_batches(batches)
    refused = [shards.manifest.shards[old] for old in new.refusals]
    source = Path(shards.manifest.folder)
    unused = sum(
        old.outcomes.samples - count_samples(shards[number].batch) for old, number in zip(refused, new.refusals, strict=True)
    )
    return commit_batch(
        folder,
        name,
        batch,
        encoding=shards.manifest.encoding,
        inputs=_inputs(shards.manifest, new, tars=batch.column("source_shard").dictionary.to_pylist()),
        outcomes=Outcomes(
            samples=sum(map(count_samples, batches)) + unused,
            quarantined=_sum(old.outcomes.quarantined for old in refused),
            filtered=_sum(old.outcomes.filtered for old in refused),
            damaged_inputs=_sum(old.outcomes.damaged_inputs for old in refused),
        ),
        quarantined=[record for old in refused for record in read_quarantine(quarantine_path(source / old.name))],
    )


def _inputs(old: Manifest, new: NewShard, tars: Sequence[str]) -> tuple[InputFile, ...]:
    """The inputs of old shards that are among `tars`, and all inputs of those whose refusals the new shard takes."""
    involved = sorted({piece.shard for piece in new.pieces} | set(new.refusals))
    files = ((number, file) for number in involved for file in old.shards[number].inputs)
    return tuple(dict.fromkeys(file for number, file in files if number in new.refusals or file.name in tars))


def _check_inputs(manifest: Manifest) -> None:
    digests: dict[str, str] = {}
    for file in (file for shard in manifest.shards for file in shard.inputs):
        check(
            digests.setdefault(file.name, file.sha256) == file.sha256,
            f"The id set {manifest.folder} was made from two tars {file.name}, and its documents don't say from which; reshard the"
            " sets that it was merged from, and merge them again.",
        )


def _totals(records: Iterable[ShardRecord]) -> Counter[str]:
    totals: Counter[str] = Counter()
    for record in records:
        totals.update(documents=record.documents, images=record.images, samples=record.outcomes.samples)
        for kind in ("quarantined", "filtered", "damaged_inputs"):
            totals.update({f"{kind} {reason}": count for reason, count in getattr(record.outcomes, kind).items()})
    return totals


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(sorted(total.items()))
