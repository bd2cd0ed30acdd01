"""Offline tokenization: tars of pairs to id shards, spread over Ray actors, one shard at a time.

RUN_DIR/config.yaml                           the resolved configuration
RUN_DIR/SPLIT/shard-00000.arrow, .json        an id shard and its sidecar, which commits it
RUN_DIR/SPLIT/shard-00000.quarantine.jsonl    the samples of its tars that couldn't be used
RUN_DIR/SPLIT/manifest.json                   the shards of the split; it appears when all of them are done
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lavit_dist.checkpoint.official import load_visual_tokenizer, tokenizer_digest, visual_tokenizer_config
from lavit_dist.config.pretokenize import PretokenizeConfig
from lavit_dist.data.id_shard import Encoding, InputFile, Outcomes, ShardRecord, is_intact, read_record, write_id_shard
from lavit_dist.data.image import IMAGE_MEAN, IMAGE_STD
from lavit_dist.data.manifest import MANIFEST, write_manifest
from lavit_dist.data.pair_encoder import PairEncoder
from lavit_dist.data.quarantine import count_reasons, write_quarantine
from lavit_dist.data.splits import list_splits
from lavit_dist.data.text_tokenizer import TextTokenizer
from lavit_dist.engine.run_folder import RunFolder
from lavit_dist.files import sha256
from lavit_dist.models.inference import freeze_for_inference
from lavit_dist.observe.logs import setup_logging
from lavit_dist.parallel.ray_jobs import Outcome, ray_cluster, run_jobs

logger = logging.getLogger(__name__)
FAILED = 1
"""Exit code when shards are left that couldn't be made."""
SECONDS_BETWEEN_LINES = 2.0


@dataclass(frozen=True)
class ShardJob:
    """An id shard to make."""

    output: Path
    inputs: tuple[Path, ...]

    @property
    def name(self) -> str:
        """Split and file, such as train/shard-00000.arrow."""
        return f"{self.output.parent.name}/{self.output.name}"


def run(config: PretokenizeConfig) -> None:
    """Makes the shards that are missing or no longer match their inputs and tokenizers, then the manifests."""
    setup_logging()
    folder = RunFolder(config.run_dir)
    folder.check_config(config)
    jobs = plan_jobs(folder.root, list_splits(config.pairs), config.inputs_per_shard)
    encoding = describe_encoding(config)
    folder.open(config)
    done = {job.name: record for job in jobs if (record := _finished(job, encoding, verify_inputs=config.verify_inputs))}
    to_do = {job.name: job for job in jobs if job.name not in done}
    logger.info("%d of %d shards are done already", len(done), len(jobs))
    failed = {}
    if to_do:
        for split in {job.output.parent for job in to_do.values()}:
            (split / MANIFEST).unlink(missing_ok=True)
        for outcome in _run_on_ray(to_do, config, encoding):
            if outcome.error is None:
                done[outcome.name] = outcome.result
            else:
                failed[outcome.name] = outcome.error
    _write_manifests(jobs, done)
    if failed:
        for name, error in failed.items():
            logger.error("%s could not be made: %s", name, error)
        logger.error("run this again to retry these %d shards; the others are kept", len(failed))
        sys.exit(FAILED)


def describe_encoding(config: PretokenizeConfig) -> Encoding:
    """What turns pairs into ids under `config`; reads digests and sizes, no weights. Raises `UserError` for what is missing."""
    visual = visual_tokenizer_config(config.tokenizer)
    text = TextTokenizer.load(config.text_tokenizer)
    return Encoding(
        visual_tokenizer=tokenizer_digest(config.tokenizer),
        text_tokenizer=text.digest,
        preprocessing=_digest(size=visual.encoder.image_size, resize="bicubic squash", mean=IMAGE_MEAN, std=IMAGE_STD),
        settings=_digest(seed=config.seed, selection=config.selection, max_pixels=config.max_pixels, precision=config.precision),
        text_vocab_size=text.vocab_size,
        codebook_size=visual.codebook.size,
    )


def plan_jobs(root: Path, splits: Mapping[str, Sequence[Path]], inputs_per_shard: int) -> list[ShardJob]:
    """Consecutive tars to numbered shards, per split; paths are absolute, since a cluster's actors have folders of their own."""
    root = root.absolute()
    return [
        ShardJob(
            root / split / f"shard-{number:05d}.arrow", tuple(tar.absolute() for tar in tars[start : start + inputs_per_shard])
        )
        for split, tars in splits.items()
        for number, start in enumerate(range(0, len(tars), inputs_per_shard))
    ]


class PretokenizeWorker:
    """What a Ray actor runs: the frozen tokenizers, and one shard after another."""

    def __init__(self, config: PretokenizeConfig, encoding: Encoding) -> None:
        self.config = config
        self.encoding = encoding

    def start(self) -> None:
        """Loads the tokenizers."""
        config = self.config
        torch.set_num_threads(config.ray.cpus_per_actor)
        device = "cuda" if config.ray.gpus_per_actor else "cpu"
        self.encoder = PairEncoder(
            freeze_for_inference(
                load_visual_tokenizer(config.tokenizer).to(device),
                dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
                compile_blocks=config.compile,
            ),
            TextTokenizer.load(config.text_tokenizer),
            seed=config.seed if config.selection == "gumbel" else None,
            batch_size=config.batch_size,
            max_pixels=config.max_pixels,
            decode_threads=config.ray.cpus_per_actor,
        )

    def run(self, job: ShardJob) -> ShardRecord:
        """Makes one shard: its quarantine file, the shard, and last its sidecar."""
        documents, quarantined = [], []
        for tar in job.inputs:
            of_tar, bad = self.encoder.encode(tar)
            documents += of_tar
            quarantined += bad
        write_quarantine(job.output.with_suffix(".quarantine.jsonl"), quarantined)
        names = {tar.name for tar in job.inputs}
        refused = [record for record in quarantined if record.key not in names]
        outcomes = Outcomes(
            samples=len({document.source for document in documents}) + len(refused),
            quarantined=count_reasons(refused),
            damaged_inputs=count_reasons(record for record in quarantined if record.key in names),
        )
        return write_id_shard(
            job.output,
            documents,
            encoding=self.encoding,
            inputs=[InputFile(tar.name, tar.stat().st_size, sha256(tar)) for tar in job.inputs],
            outcomes=outcomes,
        )


def _finished(job: ShardJob, encoding: Encoding, *, verify_inputs: bool) -> ShardRecord | None:
    """The record of a shard that is there, intact, and made from these inputs by these tokenizers; else None."""
    record = read_record(job.output)
    if record is None or record.encoding != encoding:
        return None
    if [(file.name, file.size) for file in record.inputs] != [(tar.name, tar.stat().st_size) for tar in job.inputs]:
        return None
    if verify_inputs and [file.sha256 for file in record.inputs] != [sha256(tar) for tar in job.inputs]:
        return None
    return record if is_intact(job.output, record) else None


def _run_on_ray(jobs: Mapping[str, ShardJob], config: PretokenizeConfig, encoding: Encoding) -> list[Outcome]:
    """Runs the jobs and logs how far they are."""
    tokenizer, text_tokenizer = (str(Path(folder).absolute()) for folder in (config.tokenizer, config.text_tokenizer))
    config = dataclasses.replace(config, tokenizer=tokenizer, text_tokenizer=text_tokenizer)
    outcomes: list[Outcome] = []
    images = 0
    with ray_cluster(config.ray):
        start = last_line = time.perf_counter()
        for outcome in run_jobs(PretokenizeWorker, (config, encoding), jobs, config.ray):
            outcomes.append(outcome)
            images += outcome.result.images if outcome.result else 0
            now = time.perf_counter()
            if now - last_line >= SECONDS_BETWEEN_LINES or len(outcomes) == len(jobs):
                last_line, elapsed = now, now - start
                left = elapsed / len(outcomes) * (len(jobs) - len(outcomes))
                logger.info(
                    "shards %d/%d | images %d | images/s %.0f | left %d:%02d",
                    len(outcomes), len(jobs), images, images / elapsed, *divmod(int(left), 60),
                )  # fmt: skip
    return outcomes


def _write_manifests(jobs: Sequence[ShardJob], done: Mapping[str, ShardRecord]) -> None:
    """Commits every split of which no shard is missing."""
    for folder in dict.fromkeys(job.output.parent for job in jobs):
        of_split = [job.name for job in jobs if job.output.parent == folder]
        if all(name in done for name in of_split):
            records = [done[name] for name in of_split]
            manifest = write_manifest(folder, records)
            logger.info(
                "%s: %d documents of %d images, %.1f codes per document, %d quarantined, fingerprint %s",
                folder,
                sum(record.documents for record in records),
                sum(record.images for record in records),
                sum(record.code_lengths.mean * record.documents for record in records) / sum(record.documents for record in records),
                sum(sum(record.outcomes.quarantined.values()) for record in records),
                manifest.fingerprint[:16],
            )  # fmt: skip


def _digest(**values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
