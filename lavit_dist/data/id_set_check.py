"""Whether an id set is what its manifest says: shards, sidecars, quarantine files, and nothing else under their names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lavit_dist.config.id_cache import IdCacheConfig
from lavit_dist.data.id_folder import IdFolder
from lavit_dist.data.id_shard import InputFile, ShardRecord, find_record, quarantine_path, sidecar_path
from lavit_dist.data.id_shards import IdShards
from lavit_dist.data.manifest import MANIFEST, Manifest
from lavit_dist.data.quarantine import Quarantined, count_reasons, parse_quarantine
from lavit_dist.errors import check

NAMED = 5
"""Flaws that a message names."""
UNFINISHED = re.compile(r"\..*\.tmp")
OF_A_SHARD = re.compile(r"(?P<stem>.+)(\.arrow|\.quarantine\.jsonl)|(?P<numbered>shard-\d+)\.json")


@dataclass(frozen=True)
class Flaw:
    """What is wrong with a file of a set, in words."""

    file: str
    what: str


def find_flaws(manifest: Manifest, cache: IdCacheConfig) -> list[Flaw]:
    """Reads all of a set where it lies, whatever the cache holds; returns what is wrong, sorted by file.

    Raises `UserError` for a store that fails.
    """
    folder = IdFolder.of(manifest.folder, cache.storage_options)
    found = [Flaw(name, what) for name, what in IdShards(manifest, cache).flaws().items()]
    for record in manifest.shards:
        found += _sidecar(folder, record)
        found += _quarantine(folder, record)
    found += _strays(folder, manifest)
    return sorted(found, key=lambda flaw: (flaw.file, flaw.what))


def check_sound(manifest: Manifest) -> None:
    """Raises `UserError` that names the first few of `find_flaws` where there are any."""
    flaws = find_flaws(manifest, IdCacheConfig())
    named = "; ".join(f"{flaw.file} {flaw.what}" for flaw in flaws[:NAMED]) + ("; …" if len(flaws) > NAMED else "")
    check(not flaws, f"The id set {manifest.folder} has {len(flaws)} flaws ({named}); mend it first, then it can be copied.")


def split_records(records: Sequence[Quarantined], inputs: Sequence[InputFile]) -> tuple[list[Quarantined], list[Quarantined]]:
    """The records of samples, and those of inputs as a whole, whose key is the name of one of `inputs`."""
    names = {file.name for file in inputs}
    return [record for record in records if record.key not in names], [record for record in records if record.key in names]


def _sidecar(folder: IdFolder, record: ShardRecord) -> Iterator[Flaw]:
    name = sidecar_path(Path(record.name)).name
    found = find_record(folder, record.name)
    if found is None:
        yield Flaw(name, "is missing, or not a sidecar of a shard")
        return
    for field in dataclasses.fields(ShardRecord):
        here, there = getattr(found, field.name), getattr(record, field.name)
        if here != there:
            yield Flaw(name, f"{field.name} is {_short(here)}, {MANIFEST} says {_short(there)}")


def _quarantine(folder: IdFolder, record: ShardRecord) -> Iterator[Flaw]:
    """Compares the records with the counts in `outcomes`, reason by reason."""
    name = quarantine_path(Path(record.name)).name
    try:
        records = parse_quarantine(folder.read(name))
    except FileNotFoundError:
        yield Flaw(name, "is missing")
        return
    except (ValueError, TypeError) as error:
        yield Flaw(name, f"has a line that is no record of a sample ({error})")
        return
    samples, whole = split_records(records, record.inputs)
    for kind, found, said in (
        ("samples", count_reasons(samples), record.outcomes.quarantined),
        ("inputs", count_reasons(whole), record.outcomes.damaged_inputs),
    ):
        for reason in sorted(found.keys() | said.keys()):
            if found.get(reason, 0) != said.get(reason, 0):
                yield Flaw(name, f"has {found.get(reason, 0)} {kind} of {reason}, {MANIFEST} says {said.get(reason, 0)}")


def _strays(folder: IdFolder, manifest: Manifest) -> Iterator[Flaw]:
    shards = {Path(record.name).stem for record in manifest.shards}
    for name in folder.names():
        if UNFINISHED.fullmatch(name):
            yield Flaw(name, "was left by a program that was interrupted; remove it")
        elif (match := OF_A_SHARD.fullmatch(name)) and (match["stem"] or match["numbered"]) not in shards:
            yield Flaw(name, f"belongs to no shard of {MANIFEST}; remove it, or remake the set if it should")


def _short(value: object) -> str:
    words = str(value)
    return words if len(words) <= 80 else f"{words[:80]}…"
