"""Images per second of the whole offline job against its model alone, and the memory of its processes at two sizes of input.

    python benchmarks/pretokenize.py [--pairs-per-tar N --tars N --width W --layers L --output benchmarks/pretokenize.md]
    python benchmarks/pretokenize.py --memory [--watched-pairs N --tars N --times N --output benchmarks/pretokenize_memory.md]

The rival is the frozen tokenizer on the same cores, fed batches that are decoded already: in one process with a thread per core, and in as
many processes with a thread each, of which the faster counts. Both sides have the same weights and pictures and take turns. The job is
`data_prep/pretokenize.py` as a user runs it; its rate is taken between its first report that has images and its last, so that starting Ray
and loading weights, which a real job does once, are left out; the rate with them is told too. With `--memory` the job's processes are
watched, with a small model that gets through more pictures, on some tars and on `--times` as many: the peak of what each has to itself.
"""

import argparse
import datetime
import io
import json
import multiprocessing
import os
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from memory_watch import MemoryWatch
from PIL import Image
from pretokenize_world import start_job, write_tars, write_tokenizers
from tables import tell

from lavit_dist.checkpoint.official import load_visual_tokenizer
from lavit_dist.data.pair_encoder import ImageEncoder
from lavit_dist.data.picture import squash
from lavit_dist.models.inference import freeze_for_inference
from lavit_dist.observe.job_progress import PROGRESS

CORES = len(os.sched_getaffinity(0))
SHARDS = 4
"""Shards that the input is cut into, at least as many as an actor does at a time."""


def model_alone(world: Path, batch_size: int, seconds: float, processes: int) -> float:
    """Images per second of `processes` processes together, on all cores."""
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        shares = [pool.submit(_encode_for, world, batch_size, seconds, CORES // processes) for _ in range(processes)]
        return sum(share.result() for share in shares)


def _encode_for(world: Path, batch_size: int, seconds: float, threads: int) -> float:
    torch.set_num_threads(threads)
    encoder = ImageEncoder(freeze_for_inference(load_visual_tokenizer(str(world / "tokenizer"))), seed=0)
    size = encoder.visual.config.encoder.image_size
    with tarfile.open(next((world / "pairs").glob("*.tar"))) as tar:
        members = [member for member in tar if member.name.endswith(".jpg")][:batch_size]
        files = [tar.extractfile(member) for member in members]
        pictures = [Image.open(io.BytesIO(file.read())).convert("RGB") for file in files if file is not None]
    pixels = np.stack([squash(picture, size) for picture in pictures])
    keys = [str(place) for place in range(len(pixels))]
    encoder.encode(keys, pixels)
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        encoder.encode(keys, pixels)
        images += len(keys)
    return images / (time.perf_counter() - start)


def job(world: Path, settings: list[str], *, watched: bool = False) -> tuple[float, float, dict[str, float]]:
    """Images per second between first and last report and over the whole run, and the peaks of memory if it is watched, which takes time."""
    run_dir = world / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    start = time.time()
    process = start_job(world, run_dir, *settings, log=world / "job.log")
    watch = MemoryWatch(process.pid)
    if watched:
        watch.start()
    assert process.wait() == 0, (world / "job.log").read_text()[-4000:]
    watch.over.set()
    reports = [json.loads(line) for line in (run_dir / PROGRESS).read_text().splitlines()]
    first, last = next(report for report in reports if report["images"]), reports[-1]
    steady = (last["images"] - first["images"]) / (last["time"] - first["time"])
    return steady, last["images"] / (last["time"] - start), dict(watch.peaks)


def settings_of(arguments: argparse.Namespace) -> list[str]:
    """How the job is started."""
    cut = [f"inputs_per_shard={arguments.tars // SHARDS}", f"batch_size={arguments.batch_size}", "report_seconds=1"]
    return [*cut, f"ray.num_cpus={CORES}", f"ray.num_actors={CORES}"]


def benchmark(arguments: argparse.Namespace, world: Path) -> Iterator[str]:
    """The lines of the report."""
    write_tokenizers(world, width=arguments.width, layers=arguments.layers, image_size=224, patch_size=14)
    write_tars(world / "pairs", arguments.tars, arguments.pairs_per_tar, arguments.side)
    yield f"# Pretokenization, {datetime.datetime.now(tz=datetime.timezone.utc):%d %B %Y}"
    yield ""
    yield f"{CORES} CPU cores, an actor on each; tower of {arguments.layers} layers, width {arguments.width}, 224 px; JPEG of {arguments.side} px;"
    yield f"batch size {arguments.batch_size}; {arguments.tars * arguments.pairs_per_tar} images in {arguments.tars} tars. Made by `benchmarks/pretokenize.py`."
    yield ""
    yield f"| round | model alone, images/s: 1 x {CORES} threads | {CORES} x 1 thread | the job, images/s | ratio to the faster | with start-up |"
    yield "| --- | --- | --- | --- | --- | --- |"
    ratios = []
    for number in range(arguments.rounds):
        alone = [model_alone(world, arguments.batch_size, arguments.seconds, processes) for processes in (1, CORES)]
        steady, whole, _ = job(world, settings_of(arguments))
        ratios.append(steady / max(alone))
        yield f"| {number + 1} | {alone[0]:.2f} | {alone[1]:.2f} | {steady:.2f} | {ratios[-1]:.3f} | {whole:.2f} |"
    yield f"| median | | | | {statistics.median(ratios):.3f} | |"


def memory(arguments: argparse.Namespace, world: Path) -> Iterator[str]:
    """The lines of the report about memory."""
    write_tokenizers(world, width=64, layers=2, image_size=224, patch_size=14)
    found = []
    for times in (1, arguments.times):
        shutil.rmtree(world / "pairs", ignore_errors=True)
        write_tars(world / "pairs", arguments.tars * times, arguments.watched_pairs, arguments.side)
        found.append(job(world, settings_of(arguments), watched=True))
    (_, _, once), (_, rate, often) = found
    pairs = arguments.tars * arguments.watched_pairs
    yield f"# Memory of pretokenization, {datetime.datetime.now(tz=datetime.timezone.utc):%d %B %Y}"
    yield ""
    yield f"Peak memory that each process has to itself, MiB, with a tower of 2 layers, width 64 ({rate:.0f} images/s), on {pairs} images and on {arguments.times} times as"
    yield "many tars of the same size. Made by `benchmarks/pretokenize.py --memory`."
    yield ""
    yield f"| process | 1 x | {arguments.times} x |"
    yield "| --- | --- | --- |"
    for name in once:
        yield f"| {name} | {once[name]:.0f} | {often.get(name, 0):.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tars", type=int, default=8)
    parser.add_argument("--pairs-per-tar", type=int, default=192)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--width", type=int, default=768, help="768 is ViT-B's; LaVIT's tower has 1408 and takes 40 layers")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--memory", action="store_true", help="watch memory instead")
    parser.add_argument("--watched-pairs", type=int, default=1500, help="pairs per tar while memory is watched")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tell((memory if arguments.memory else benchmark)(arguments, Path(folder)), arguments.output)


if __name__ == "__main__":
    main()
