"""Several id sets in one folder: their shards under new names, byte for byte, one set after the other."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

from lavit_dist.data.id_folder import IdFolder
from lavit_dist.data.id_shard import Encoding, ShardRecord, quarantine_path
from lavit_dist.data.id_shard_writer import write_record
from lavit_dist.data.manifest import Manifest, load_manifest, write_manifest
from lavit_dist.data.reshard import check_nothing_lost, shard_name
from lavit_dist.errors import UserError, check
from lavit_dist.files import new_folder, replacing, sha256

NAMED = 5
"""Things of a kind that a message names."""


def merge(sources: Sequence[Manifest], output: Path) -> Manifest:
    """Writes the local sets `sources`, encoded alike, to the new folder `output`, which appears when it is whole.

    Shards keep their documents, so tars of one name in two sets stay apart. Raises `UserError` for sets that were encoded
    otherwise, or that have shards or inputs in common.
    """
    check(len(sources) > 1, "There must be two id sets or more to merge; name several folders.")
    for first, second in itertools.combinations(sources, 2):
        _check_alike(first, second)
        _check_apart(first, second)
    olds = [(Path(source.folder), record) for source in sources for record in source.shards]
    with new_folder(output) as folder:
        records = [_copy(place / old.name, old, folder / shard_name(number, len(olds))) for number, (place, old) in enumerate(olds)]
        check_nothing_lost((old for _, old in olds), records, "The merged set")
        write_manifest(folder, records)
    return load_manifest(output)


def _copy(source: Path, old: ShardRecord, path: Path) -> ShardRecord:
    for origin, target in ((quarantine_path(source), quarantine_path(path)), (source, path)):
        with replacing(target) as temporary:
            shutil.copyfile(origin, temporary)
    check(sha256(path) == old.sha256, f"{source} was changed while it was copied; verify the set and merge again.")
    record = dataclasses.replace(old, name=path.name)
    write_record(IdFolder.of(path.parent, {}), record)
    return record


def _check_alike(first: Manifest, second: Manifest) -> None:
    differing = [
        f"{field.name} {getattr(first.encoding, field.name)} and {getattr(second.encoding, field.name)}"
        for field in dataclasses.fields(Encoding)
        if getattr(first.encoding, field.name) != getattr(second.encoding, field.name)
    ]
    check(
        not differing,
        f"The id sets {first.folder} and {second.folder} were encoded otherwise ({'; '.join(differing)}); merge sets of the same"
        " tokenizers and settings, or train on both as `sources`.",
    )


def _check_apart(first: Manifest, second: Manifest) -> None:
    """Raises `UserError` when the sets have documents in common, by digests of what they were made from and of what they hold."""
    inputs = {file.sha256: file.name for shard in first.shards for file in shard.inputs}
    contents = {shard.sha256 for shard in first.shards if shard.documents}
    common = {inputs[file.sha256]: None for shard in second.shards for file in shard.inputs if file.sha256 in inputs}
    common |= {shard.name: None for shard in second.shards if shard.sha256 in contents}
    if common:
        named = ", ".join(list(common)[:NAMED]) + (f" and {len(common) - NAMED} more" if len(common) > NAMED else "")
        raise UserError(
            f"The id sets {first.folder} and {second.folder} have {named} in common, so documents would be doubled; merge sets of"
            " different pairs. To see a set more often, give it a larger weight in `sources`."
        )
