"""Jobs that make id shards of images: tars of pairs, spread over Ray actors, one shard at a time.

RUN_DIR/config.yaml       the resolved configuration
RUN_DIR/progress.jsonl    how far the job was, and how fast
OUTPUT/SPLIT/…            the id set; see `pipelines.shard_jobs`. OUTPUT is RUN_DIR unless the settings say otherwise
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lavit_dist.config.base import to_dict
from lavit_dist.config.image_job import ImageJobConfig
from lavit_dist.config.ray import DecodingRayConfig
from lavit_dist.data.id_folder import IdFolder
from lavit_dist.data.id_shard import Encoding, ShardRecord
from lavit_dist.data.image import IMAGE_MEAN, IMAGE_STD
from lavit_dist.data.shard_list import MISSING, Shard
from lavit_dist.data.splits import list_splits
from lavit_dist.engine.run_folder import RunFolder, hold
from lavit_dist.errors import check
from lavit_dist.observe.job_progress import JobProgress
from lavit_dist.parallel.ray_cluster import MEBIBYTE, nodes_of_cluster, ray_cluster, room_for
from lavit_dist.parallel.ray_jobs import Share, run_jobs
from pipelines.image_worker import JOBS_AT_A_TIME, ImageWorker, Progress
from pipelines.shard_jobs import (
    ShardJob,
    digest,
    find_finished,
    plan_jobs,
    remove_temporary_files,
    report_failures,
    withdraw_manifests,
    write_manifests,
)

logger = logging.getLogger(__name__)


def run_image_jobs(
    config: ImageJobConfig, worker: type[ImageWorker], describe_encoding: Callable[[], Encoding], models: Sequence[str]
) -> None:
    """Makes the shards that are missing or no longer match their inputs and models, then the manifests.

    `describe_encoding` reads large files, so what is quickly found wrong is told before. `models` are the settings that name folders of models, which actors may see from another place than this process.
    """
    folder = RunFolder(config.run_dir)
    folder.check_config(config)
    splits = list_splits(config.pairs, config.storage_options)
    _check_there([shard for shards in splits.values() for shard in shards])
    jobs = plan_jobs(_folders(config, splits), splits, config.inputs_per_shard)
    encoding = describe_encoding()
    folder.open(config)
    absolute: Any = {name: str(Path(getattr(config, name)).absolute()) for name in models}
    with _output_held(config):
        _make(dataclasses.replace(config, **absolute), worker, encoding, jobs)


def _make(config: ImageJobConfig, worker: type[ImageWorker], encoding: Encoding, jobs: Sequence[ShardJob]) -> None:
    remove_temporary_files(jobs)
    done = find_finished(jobs, encoding, verify_inputs=config.verify_inputs)
    to_do = {job.name: job for job in jobs if job.name not in done}
    logger.info("%d of %d shards are done already", len(done), len(jobs))
    failed: dict[str, str] = {}
    if to_do:
        withdraw_manifests(to_do.values())
        progress = JobProgress(Path(config.run_dir), shards=len(jobs), done=len(done), seconds_between=config.report_seconds)
        try:
            _run_on_ray(config, worker, encoding, to_do, progress, done, failed)
        finally:
            remove_temporary_files(jobs)
    try:
        write_manifests(jobs, done)
    finally:
        report_failures(failed)


@contextmanager
def _output_held(config: ImageJobConfig) -> Iterator[None]:
    """Keeps other runs out of a local output that is not the run's own folder. Stores have no locks."""
    root = Path(config.output or config.run_dir)
    if "://" in str(config.output) or root.absolute() == Path(config.run_dir).absolute():
        yield
        return
    lock = hold(root, "output")
    try:
        yield
    finally:
        lock.release()


def _check_there(tars: Sequence[Shard]) -> None:
    missing = [tar.path for tar in tars if tar.size == MISSING]
    check(
        not missing,
        f"pairs names {len(missing)} tars that do not exist, such as {missing[0] if missing else ''}; check the names, or list those that do.",
    )


def preprocessing_digest(image_size: int) -> str:
    """Digest of how bytes become pixels of `image_size`."""
    return digest(size=image_size, resize="bicubic squash", mean=IMAGE_MEAN, std=IMAGE_STD)


def settings_digest(config: ImageJobConfig) -> str:
    """Digest of the settings that decide ids, beside the models."""
    return digest(
        seed=config.seed,
        selection=config.selection,
        max_pixels=config.max_pixels,
        precision=config.precision,
        filter=to_dict(config)["filter"],
    )


def _folders(config: ImageJobConfig, splits: Mapping[str, Any]) -> dict[str, IdFolder]:
    """Where the shards of each split are written; local paths are absolute, since a cluster's actors have folders of their own."""
    output = config.output or config.run_dir
    root = output.rstrip("/") if "://" in output else str(Path(output).absolute())
    return {split: IdFolder.of(f"{root}/{split}", config.storage_options) for split in splits}


def _run_on_ray(
    config: ImageJobConfig,
    worker: type[ImageWorker],
    encoding: Encoding,
    jobs: Mapping[str, ShardJob],
    progress: JobProgress,
    done: dict[str, ShardRecord],
    failed: dict[str, str],
) -> None:
    """Runs the jobs; the record of each goes to `done`, or its error to `failed`."""
    said: list[Progress] = []
    actors = 0

    def tell(*, last: bool = False) -> None:
        progress.tell(
            images=sum(each.images for each in said),
            device_seconds=sum(each.device_seconds for each in said),
            actors=actors,
            quarantined=sum((each.quarantined for each in said), Counter()),
            last=last,
        )

    def report(of_actors: Mapping[Any, Progress], up: int) -> None:
        nonlocal actors
        said[:], actors = of_actors.values(), up
        tell()

    with ray_cluster(config.ray):
        decoders, cpus_per_decoder = decoders_of(config.ray)
        share = Share(config.ray.cpus_per_actor + decoders * cpus_per_decoder, config.ray.gpus_per_actor, JOBS_AT_A_TIME)
        arguments = (config, encoding, decoders, cpus_per_decoder)
        _tell_if_store_is_small(config.ray, share, worker(*arguments).bytes_ahead())
        for outcome in run_jobs(worker, arguments, jobs, config.ray, share, report):
            if outcome.error is None:
                done[outcome.name] = outcome.result
                progress.done += 1
            else:
                failed[outcome.name] = outcome.error
    tell(last=True)


def _tell_if_store_is_small(ray: DecodingRayConfig, share: Share, bytes_per_actor: int) -> None:
    needed = bytes_per_actor * (ray.num_actors or room_for(share.cpus, share.gpus)) // MEBIBYTE
    if ray.address is None and needed > ray.object_store_mb:
        logger.warning(
            "decoded pictures on their way take up to %d MiB, more than ray.object_store_mb %d, so that some will go through the disk;"
            " raise it, or lower batch_size", needed, ray.object_store_mb,
        )  # fmt: skip


def decoders_of(config: DecodingRayConfig) -> tuple[int, float]:
    """How many decoders each actor of the cluster has, and the CPUs that each of them counts as."""
    cpus = config.cpus_per_decoder
    if cpus is None:
        cpus = 1.0 if config.gpus_per_actor else 0.0
    if config.decoders_per_actor is not None:
        return config.decoders_per_actor, cpus
    if not config.gpus_per_actor or not cpus:
        return 1, cpus
    shares = [node.get("CPU", 0) * config.gpus_per_actor / node["GPU"] for node in nodes_of_cluster() if node.get("GPU", 0) > 0]
    return max(1, int((min(shares, default=0) - config.cpus_per_actor) / cpus)), cpus
