"""Offline tokenization of text corpora: files of texts to id shards of text-only documents, spread over Ray actors.

RUN_DIR/config.yaml                                the resolved configuration
RUN_DIR/jobs/job-00000.json                        a job, one file or several small ones, is done: how many shards it gave each split
RUN_DIR/SPLIT/shard-00000-0000.arrow, .json        a shard of job 0 and its sidecar, which commits it
RUN_DIR/SPLIT/shard-00000-0000.quarantine.jsonl    the rows that couldn't be used
RUN_DIR/SPLIT/manifest.json                        the shards of the split; it appears when all of them are done
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import TypeAdapter, ValidationError

from lavit_dist.config.tokenize_text import TokenizeTextConfig
from lavit_dist.data.corpus_files import Piece, at_hand, list_corpus, read_pieces
from lavit_dist.data.corpus_rows import Columns
from lavit_dist.data.id_folder import IdFolder
from lavit_dist.data.id_shard import Encoding, InputFile, ShardRecord, is_intact, read_record
from lavit_dist.data.id_shard_writer import write_id_shard
from lavit_dist.data.manifest import MANIFEST
from lavit_dist.data.own_folder import OwnFolder
from lavit_dist.data.pair_keys import heldout_place
from lavit_dist.data.pairs import SPLITS
from lavit_dist.data.quarantine import count_reasons, write_quarantine
from lavit_dist.data.shard_list import Shard
from lavit_dist.data.text_encoder import TextEncoder
from lavit_dist.data.text_tokenizer import TextTokenizer
from lavit_dist.engine.run_folder import RunFolder
from lavit_dist.files import remove_leftovers, sha256, write_atomically
from lavit_dist.observe.logs import setup_logging
from lavit_dist.parallel.ray_cluster import ray_cluster
from lavit_dist.parallel.ray_jobs import run_jobs
from pipelines.shard_jobs import commit_split, digest, report_failures

logger = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 2.0
TRAIN, HELDOUT = SPLITS
MAY_CHANGE = ("corpus", "storage_options")
"""Jobs know their files by name, size and digest: where they lie may change, and files may be added."""
SharedOut = dict[str, list[ShardRecord]]
"""The shards of a job by split, as many in each."""


@dataclass(frozen=True)
class TextJob:
    """Files whose texts make some shards of each split."""

    root: Path
    """The run's folder."""
    number: int
    files: tuple[Shard, ...]

    @property
    def name(self) -> str:
        """Such as job-00000."""
        return f"job-{self.number:05d}"

    @property
    def record(self) -> Path:
        """What says that the job is done."""
        return self.root / "jobs" / f"{self.name}.json"

    def output(self, split: str, piece: int) -> Path:
        """The shard that a piece of the files gives a split."""
        return self.root / split / f"shard-{self.number:05d}-{piece:04d}.arrow"


@dataclass(frozen=True)
class JobRecord:
    """A job that is done."""

    inputs: tuple[InputFile, ...]
    encoding: Encoding
    num_shards: int
    """In each split."""


def run(config: TokenizeTextConfig) -> None:
    """Makes the shards that are missing or no longer match their files and tokenizer, then the manifests."""
    setup_logging()
    folder = RunFolder(config.run_dir, may_change=MAY_CHANGE)
    folder.check_config(config)
    root = folder.root.absolute()  # a cluster's actors have folders of their own
    jobs = plan_jobs(root, list_corpus(config.corpus, config.storage_options), config.bytes_per_shard)
    encoding = describe_encoding(config)
    folder.open(config)
    _remove_leftovers(root, config)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing needs no interpreter lock
        found = pool.map(lambda job: _finished(job, encoding, splits_of(config), verify_inputs=config.verify_inputs), jobs)
        done = {job.name: shards for job, shards in zip(jobs, found, strict=True) if shards is not None}
    to_do = {job.name: job for job in jobs if job.name not in done}
    logger.info("%d of %d jobs are done already", len(done), len(jobs))
    failed: dict[str, str] = {}
    if to_do:
        for split in splits_of(config):
            (root / split / MANIFEST).unlink(missing_ok=True)
        config = dataclasses.replace(config, text_tokenizer=str(Path(config.text_tokenizer).absolute()))
        try:
            _run_on_ray(config, encoding, to_do, done, failed)
        finally:
            _remove_leftovers(root, config)
    if not failed:
        for split in splits_of(config):
            records = [record for job in jobs for record in done[job.name][split]]
            commit_split(IdFolder.of(root / split, {}), records, may_be_empty=split == HELDOUT)
    report_failures(failed)


def describe_encoding(config: TokenizeTextConfig) -> Encoding:
    """What turns texts into ids under `config`, and which. Raises `UserError` for a missing tokenizer."""
    text = TextTokenizer.load(config.text_tokenizer)
    deciding = ("text_column", "key_column", "seed", "heldout_fraction", "min_characters", "max_characters", "bytes_per_shard")
    return Encoding(
        visual_tokenizer=None,
        text_tokenizer=text.digest,
        preprocessing=None,
        settings=digest(**{name: getattr(config, name) for name in deciding}),
        text_vocab_size=text.vocab_size,
        codebook_size=0,
    )


def plan_jobs(root: Path, files: Sequence[Shard], bytes_per_shard: int) -> list[TextJob]:
    """Consecutive files to numbered jobs: as many as have `bytes_per_shard` together, or one that is larger or of unknown size."""
    groups: list[list[Shard]] = []
    size = bytes_per_shard
    for file in files:
        of_file = bytes_per_shard if file.size is None else file.size
        if not groups or size + of_file > bytes_per_shard:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += of_file
    return [TextJob(root, number, tuple(group)) for number, group in enumerate(groups)]


def splits_of(config: TokenizeTextConfig) -> tuple[str, ...]:
    """The splits that the rows are shared out to."""
    return SPLITS if config.heldout_fraction else (TRAIN,)


class TokenizeTextWorker:
    """What a Ray actor runs: the tokenizer, and one job after another."""

    def __init__(self, config: TokenizeTextConfig, encoding: Encoding) -> None:
        self.config = config
        self.encoding = encoding

    def start(self) -> None:
        """Loads the tokenizer."""
        self._folder = OwnFolder(self.config.cache_folder, "cache_folder")
        os.environ["RAYON_NUM_THREADS"] = str(self.config.ray.cpus_per_actor)  # read once, when the first batch is encoded
        tokenizer = TextTokenizer.load(self.config.text_tokenizer)
        limits = {name: getattr(self.config, name) for name in ("min_characters", "max_characters")}
        self.encoder = TextEncoder(tokenizer, **limits)

    def run(self, job: TextJob) -> SharedOut:
        """Makes the shards of a job, but for those that an earlier try left whole, and last its record."""
        job.record.unlink(missing_ok=True)
        shards: SharedOut = {split: [] for split in splits_of(self.config)}
        columns = Columns(self.config.text_column, self.config.key_column)
        num_shards = 0
        with ExitStack() as stack:
            files = [(file.name, stack.enter_context(at_hand(file, self._folder.path))) for file in job.files]
            inputs = tuple(InputFile(name, path.stat().st_size, sha256(path)) for name, path in files)
            for number, piece in enumerate(read_pieces(files, columns, self.config.bytes_per_shard)):
                num_shards = number + 1
                for split, part in self._split(piece).items():
                    output = job.output(split, number)
                    shards[split].append(_finished_shard(output, inputs, self.encoding) or self._make_shard(output, part, inputs))
        record = JobRecord(inputs, self.encoding, num_shards)
        write_atomically(job.record, json.dumps(dataclasses.asdict(record), indent=1).encode())
        return shards

    def stop(self) -> None:
        """Removes its folder."""
        self._folder.close()

    def _split(self, piece: Piece) -> dict[str, Piece]:
        """What each split gets of a piece, by keys; a damaged file goes with its name."""
        parts = {split: Piece() for split in splits_of(self.config)}
        for row in piece.rows:
            parts[self._split_of(row.key)].rows.append(row)
        for record in piece.damaged:
            parts[self._split_of(record.key)].damaged.append(record)
        return parts

    def _split_of(self, key: str) -> str:
        return HELDOUT if heldout_place(key, self.config.seed) < self.config.heldout_fraction else TRAIN

    def _make_shard(self, path: Path, piece: Piece, inputs: Sequence[InputFile]) -> ShardRecord:
        encoded = self.encoder.encode(piece.rows)
        write_quarantine(path.with_suffix(".quarantine.jsonl"), [*encoded.quarantined, *piece.damaged])
        outcomes = dataclasses.replace(encoded.outcomes, damaged_inputs=count_reasons(piece.damaged))
        return write_id_shard(path, encoded.documents, encoding=self.encoding, inputs=inputs, outcomes=outcomes)


def _remove_leftovers(root: Path, config: TokenizeTextConfig) -> None:
    for folder in ("jobs", *splits_of(config)):
        remove_leftovers(root / folder)


def _finished(job: TextJob, encoding: Encoding, splits: Sequence[str], *, verify_inputs: bool) -> SharedOut | None:
    """The shards of a job that is done, all intact and made from these files by this tokenizer; else None."""
    try:
        record = TypeAdapter(JobRecord).validate_json(job.record.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    if len(job.files) != len(record.inputs):
        return None
    for file, known in zip(job.files, record.inputs, strict=True):
        if (file.name, known.size if file.size is None else file.size) != (known.name, known.size):
            return None
        if verify_inputs and _digest_of(file) != known.sha256:
            return None
    shards: SharedOut = {}
    for split in splits:
        found = [_finished_shard(job.output(split, piece), record.inputs, encoding) for piece in range(record.num_shards)]
        shards[split] = [record for record in found if record is not None]
        if len(shards[split]) < len(found):
            return None
    return shards


def _digest_of(file: Shard) -> str:
    with TemporaryDirectory() as folder, at_hand(file, Path(folder)) as path:
        return sha256(path)


def _finished_shard(path: Path, inputs: Sequence[InputFile], encoding: Encoding) -> ShardRecord | None:
    """The record of a shard that is there, intact, and made from `inputs` under `encoding`; else None."""
    record = read_record(path)
    if record is None or record.encoding != encoding or record.inputs != tuple(inputs):
        return None
    return record if is_intact(path, record) else None


def _run_on_ray(
    config: TokenizeTextConfig,
    encoding: Encoding,
    jobs: Mapping[str, TextJob],
    done: dict[str, SharedOut],
    failed: dict[str, str],
) -> None:
    """Runs the jobs and logs how far they are; the shards of each go to `done`, or its error to `failed`."""
    documents = ended = 0
    with ray_cluster(config.ray):
        start = last_line = time.perf_counter()
        for outcome in run_jobs(TokenizeTextWorker, (config, encoding), jobs, config.ray):
            ended += 1
            if outcome.error is None:
                done[outcome.name] = outcome.result
                documents += sum(record.documents for records in outcome.result.values() for record in records)
            else:
                failed[outcome.name] = outcome.error
            now = time.perf_counter()
            if now - last_line >= SECONDS_BETWEEN_LINES or ended == len(jobs):
                last_line, elapsed = now, now - start
                left = timedelta(seconds=round(elapsed / ended * (len(jobs) - ended)))
                logger.info(
                    "jobs %d/%d | documents %d | documents/s %.0f | left %s", ended, len(jobs), documents, documents / elapsed, left
                )
