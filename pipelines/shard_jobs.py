"""What the offline jobs that make id shards have in common: which shards are done, the run with its progress, and the manifests."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavit_dist.config.ray import RayConfig
from lavit_dist.data.id_shard import Encoding, InputFile, ShardRecord, is_intact, read_record
from lavit_dist.data.manifest import write_manifest
from lavit_dist.errors import check
from lavit_dist.parallel.ray_jobs import Outcome, Worker, ray_cluster, run_jobs

logger = logging.getLogger(__name__)
FAILED = 1
"""Exit code when shards are left that couldn't be made."""
SECONDS_BETWEEN_LINES = 2.0


def finished_shard(path: Path, inputs: Sequence[InputFile], encoding: Encoding) -> ShardRecord | None:
    """The record of a shard that is there, intact, and made from `inputs` under `encoding`; else None."""
    record = read_record(path)
    if record is None or record.encoding != encoding or record.inputs != tuple(inputs):
        return None
    return record if is_intact(path, record) else None


def run_on_ray(
    worker: type[Worker],
    arguments: tuple[Any, ...],
    jobs: Mapping[str, Any],
    ray: RayConfig,
    *,
    unit: str,
    done_by: Callable[[Any], int],
) -> list[Outcome]:
    """Runs the jobs and logs how far they are; of a job with the result `r`, `done_by(r)` counts what it got through, in `unit`."""
    outcomes: list[Outcome] = []
    done = 0
    with ray_cluster(ray):
        start = last_line = time.perf_counter()
        for outcome in run_jobs(worker, arguments, jobs, ray):
            outcomes.append(outcome)
            done += done_by(outcome.result) if outcome.error is None else 0
            now = time.perf_counter()
            if now - last_line >= SECONDS_BETWEEN_LINES or len(outcomes) == len(jobs):
                last_line, elapsed = now, now - start
                left = elapsed / len(outcomes) * (len(jobs) - len(outcomes))
                logger.info(
                    "jobs %d/%d | %s %d | %s/s %.0f | left %d:%02d",
                    *(len(outcomes), len(jobs), unit, done, unit, done / elapsed, *divmod(int(left), 60)),
                )
    return outcomes


def commit_split(folder: Path, records: Sequence[ShardRecord], *, may_be_empty: bool = False) -> None:
    """Writes the manifest of a split all of whose shards are done.

    One without a document gets none: it raises `UserError`, or is told where it `may_be_empty`.
    """
    lost = "; ".join(
        f"{kind.replace('_', ' ')}: {_counted(records, kind)}" for kind in ("quarantined", "filtered", "damaged_inputs")
    )
    if not any(record.documents for record in records):
        sentence = f"{folder} holds no document ({lost}); its *.quarantine.jsonl files say why."
        check(may_be_empty, sentence)
        logger.warning("%s It gets no manifest.", sentence)
        return
    manifest = write_manifest(folder, records)
    documents = sum(record.documents for record in records)
    logger.info("%s: %d documents; %s; fingerprint %s", folder, documents, lost, manifest.fingerprint[:16])


def _counted(records: Sequence[ShardRecord], kind: str) -> str:
    """Such as `3 (empty_text 2, not_utf8 1)`."""
    counts: Counter[str] = sum((Counter(getattr(record.outcomes, kind)) for record in records), Counter())
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
    return f"{counts.total()} ({reasons})" if counts else "none"


def report_failures(failed: Iterable[Outcome]) -> None:
    """Tells which jobs could not be done, and why."""
    failed = list(failed)
    for outcome in failed:
        logger.error("%s could not be made: %s", outcome.name, outcome.error)
    if failed:
        logger.error("run this again to retry these %d; the others are kept", len(failed))


def digest(**values: Any) -> str:
    """Hexadecimal sha256 of settings."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
