"""What every job that makes id shards shares: which shards to make, which are there already, and committing the set when all are.

OUTPUT/SPLIT/shard-00000.arrow, .json        an id shard and its sidecar, which commits it
OUTPUT/SPLIT/shard-00000.quarantine.jsonl    the samples of its inputs that couldn't be used
OUTPUT/SPLIT/manifest.json                   the shards of the split; it appears when all of them are done
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavit_dist.data.id_folder import IdFolder
from lavit_dist.data.id_shard import Encoding, ShardRecord, find_record, is_intact
from lavit_dist.data.manifest import MANIFEST, write_manifest
from lavit_dist.data.shard_list import MISSING, Shard
from lavit_dist.errors import check
from lavit_dist.files import remove_leftovers, sha256

logger = logging.getLogger(__name__)
LOOKING_THREADS = 16
FAILED = 1
"""Exit code when shards are left that couldn't be made."""


@dataclass(frozen=True)
class ShardJob:
    """An id shard to make."""

    folder: IdFolder
    split: str
    file: str
    inputs: tuple[Shard, ...]

    @property
    def name(self) -> str:
        """Split and file, such as train/shard-00000.arrow."""
        return f"{self.split}/{self.file}"


def plan_jobs(folders: Mapping[str, IdFolder], splits: Mapping[str, Sequence[Shard]], inputs_per_shard: int) -> list[ShardJob]:
    """Consecutive inputs to numbered shards, per split."""
    return [
        ShardJob(folders[split], split, f"shard-{number:05d}.arrow", tuple(inputs[start : start + inputs_per_shard]))
        for split, inputs in splits.items()
        for number, start in enumerate(range(0, len(inputs), inputs_per_shard))
    ]


def find_finished(jobs: Sequence[ShardJob], encoding: Encoding, *, verify_inputs: bool) -> dict[str, ShardRecord]:
    """The records, by name of the job, of shards that are there, intact, and made from the same inputs by the same tokenizers."""
    sizes = {split: folder.sizes([job.file for job in jobs if job.split == split]) for split, folder in _folders(jobs).items()}

    def look(job: ShardJob) -> ShardRecord | None:
        size = sizes[job.split][job.file]
        record = find_record(job.folder, job.file) if size != MISSING else None
        if record is None or size not in (None, record.size) or not _is_of(job, record, encoding, verify_inputs=verify_inputs):
            return None
        return record

    with ThreadPoolExecutor(LOOKING_THREADS) as pool:
        found = zip(jobs, pool.map(look, jobs), strict=True)
        return {job.name: record for job, record in found if record is not None}


def withdraw_manifests(jobs: Iterable[ShardJob]) -> None:
    """Removes the manifests of the splits that `jobs` will change."""
    for folder in _folders(jobs).values():
        folder.remove(MANIFEST)


def write_manifests(jobs: Sequence[ShardJob], done: Mapping[str, ShardRecord]) -> None:
    """Commits every split of which no shard is missing."""
    for split, folder in _folders(jobs).items():
        of_split = [job.name for job in jobs if job.split == split]
        if all(name in done for name in of_split):
            commit_split(folder, [done[name] for name in of_split])


def commit_split(folder: IdFolder, records: Sequence[ShardRecord], *, may_be_empty: bool = False) -> None:
    """Writes the manifest of a split all of whose shards are done.

    One without a document gets none: it raises `UserError`, or is told where it `may_be_empty`.
    """
    lost = "; ".join(
        f"{kind.replace('_', ' ')}: {_counted(records, kind)}" for kind in ("quarantined", "filtered", "damaged_inputs")
    )
    documents = sum(record.documents for record in records)
    if not documents:
        sentence = (
            f"{folder.name} holds no document ({lost}); its *.quarantine.jsonl files say why samples were refused, and the settings which"
            " are left out: change what is read, or what is asked of it."
        )
        check(may_be_empty, sentence)
        logger.warning("%s It gets no manifest.", sentence)
        return
    manifest = write_manifest(folder, records)
    samples, images = sum(record.outcomes.samples for record in records), sum(record.images for record in records)
    logger.info(
        "%s: %d documents of %d samples, %d images; %s; fingerprint %s",
        folder.name, documents, samples, images, lost, manifest.fingerprint[:16],
    )  # fmt: skip


def report_failures(failed: Mapping[str, str]) -> None:
    """Tells which jobs could not be done, and ends the program, if there are any."""
    for name, error in failed.items():
        logger.error("%s could not be made: %s", name, error)
    if failed:
        logger.error("run this again to retry these %d; the others are kept", len(failed))
        sys.exit(FAILED)


def digest(**values: Any) -> str:
    """Hexadecimal sha256 of settings."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def remove_temporary_files(jobs: Iterable[ShardJob]) -> None:
    """Removes what killed writers left half-written. No other run may be at work in the folders."""
    for folder in _folders(jobs).values():
        if folder.system is None:
            remove_leftovers(Path(folder.path))


def _folders(jobs: Iterable[ShardJob]) -> dict[str, IdFolder]:
    return {job.split: job.folder for job in jobs}


def _is_of(job: ShardJob, record: ShardRecord, encoding: Encoding, *, verify_inputs: bool) -> bool:
    if record.encoding != encoding:
        return False
    if [file.name for file in record.inputs] != [shard.name for shard in job.inputs]:
        return False
    if any(shard.size not in (None, file.size) for file, shard in zip(record.inputs, job.inputs, strict=True)):
        return False
    local = [shard.path for shard in job.inputs if shard.file_system is None]
    if (
        verify_inputs
        and len(local) == len(job.inputs)
        and [file.sha256 for file in record.inputs] != [sha256(Path(path)) for path in local]
    ):
        return False
    return job.folder.system is not None or is_intact(Path(job.folder.path) / job.file, record)


def _counted(records: Sequence[ShardRecord], kind: str) -> str:
    """Such as `3 (empty_text 2, not_utf8 1)`."""
    counts: Counter[str] = sum((Counter(getattr(record.outcomes, kind)) for record in records), Counter())
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
    return f"{counts.total()} ({reasons})" if counts else "none"
