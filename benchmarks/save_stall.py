"""How long training stands still for a checkpoint, written in the background and at once, and what the rest costs meanwhile.

    python benchmarks/save_stall.py [--megabytes 1024 --repeats 5 --output benchmarks/save_stall.md]

The state is what Adam has of fp32 weights: a third weights, a third of each average. Both ways write the same files by the same program, with
digests and fsync; beside them torch.save of the same tensors, without either, is timed, and torch's own distributed checkpoint in both of its
ways. Steps of matrix products run on while a checkpoint is written in the background. What was written is read back and compared bit for bit.
"""

import argparse
import datetime
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from tables import tell

from lavit_dist.checkpoint.snapshot import Snapshot
from lavit_dist.checkpoint.store import CheckpointStore, Retention
from lavit_dist.checkpoint.writer import CheckpointWriter
from lavit_dist.parallel.distributed import free_port

CORES = len(os.sched_getaffinity(0))
FILE = "weights/part-00000.safetensors"


def state_of(megabytes: int) -> dict[str, torch.Tensor]:
    """Tensors of 8 MiB each."""
    torch.manual_seed(0)
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    return {f"{n}.{kinds[n % 3]}": torch.randn(2**21) for n in range(megabytes // 8)}


def train_for(seconds: float) -> float:
    """Steps per second."""
    matrix, steps, start = torch.randn(512, 512), 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        torch.mm(matrix, matrix)
        steps += 1
    return steps / (time.perf_counter() - start)


def measure(state: dict[str, torch.Tensor], root: Path, repeats: int) -> Iterator[tuple[str, float, float]]:
    """Per way: its name, seconds of standing still, seconds until the checkpoint is whole; medians, of which the first save isn't one."""
    writer = CheckpointWriter(CheckpointStore(root / "ours"), Retention(last=1))

    def ours(step: int, meanwhile: Callable[[], None]) -> tuple[float, float]:
        start = time.perf_counter()
        writer.begin(step, Snapshot({FILE: state}))
        stall = time.perf_counter() - start
        meanwhile()
        while writer.writing:
            time.sleep(0.001)
        written = time.perf_counter()
        writer.poll(writing=False, failed=False)  # between two steps: the manifest, its fsync, and a rename
        stall += time.perf_counter() - written
        whole = time.perf_counter() - start
        writer.finish()
        return stall, whole

    def plain(step: int, meanwhile: Callable[[], None]) -> tuple[float, float]:
        start = time.perf_counter()
        torch.save(state, root / "plain.pt")
        return (time.perf_counter() - start,) * 2

    def torch_sync(step: int, meanwhile: Callable[[], None]) -> tuple[float, float]:
        shutil.rmtree(root / "dcp", ignore_errors=True)
        start = time.perf_counter()
        dcp.save(state, checkpoint_id=root / "dcp", no_dist=True)
        return (time.perf_counter() - start,) * 2

    def torch_async(step: int, meanwhile: Callable[[], None]) -> tuple[float, float]:
        shutil.rmtree(root / "dcp", ignore_errors=True)
        start = time.perf_counter()
        writing = dcp.async_save(state, checkpoint_id=root / "dcp")
        stall = time.perf_counter() - start
        meanwhile()
        writing.result()
        return stall, time.perf_counter() - start

    ways = {
        "ours, at once": (ours, lambda: None),
        "ours, in the background": (ours, lambda: train_for(0.5)),
        "torch.save": (plain, lambda: None),
        "torch.distributed.checkpoint, save": (torch_sync, lambda: None),
        "torch.distributed.checkpoint, async_save": (torch_async, lambda: train_for(0.5)),
    }
    for name, (way, meanwhile) in ways.items():
        found = [way(step, meanwhile) for step in range(1, repeats + 2)][1:]
        stalls, wholes = zip(*found, strict=True)
        at_once = "background" not in name and "async" not in name
        yield name, statistics.median(wholes if at_once else stalls), statistics.median(wholes)


def benchmark(arguments: argparse.Namespace, root: Path) -> Iterator[str]:
    """The lines of the report."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)  # which async_save wants
    state = state_of(arguments.megabytes)
    yield f"# Standing still for a checkpoint, {datetime.datetime.now(tz=datetime.timezone.utc):%d %B %Y}"
    yield ""
    yield f"A state of {arguments.megabytes} MiB in fp32 tensors, one process, {CORES} CPU cores; medians of {arguments.repeats}. Ours writes"
    yield "digests and fsyncs; torch's don't. Made by `benchmarks/save_stall.py`."
    yield ""
    yield "| way | training stands still, s | of ours at once | until it is whole, s |"
    yield "| --- | --- | --- | --- |"
    base = None
    for name, stall, whole in measure(state, root, arguments.repeats):
        base = base or stall
        yield f"| {name} | {stall:.3f} | {stall / base:.1%} | {whole:.2f} |"
    (folder,) = (root / "ours").glob("step-*")
    read = load_file(folder / FILE)
    same = all(torch.equal(read[name], tensor) for name, tensor in state.items()) and read.keys() == state.keys()
    writer = CheckpointWriter(CheckpointStore(root / "beside"), Retention(last=1))
    beside = []
    for step, threads in enumerate((CORES, max(1, CORES - 1)), start=1):
        torch.set_num_threads(threads)
        alone = train_for(2.0)
        writer.begin(step, Snapshot({FILE: state}))
        rates = []
        while writer.writing:
            rates.append(train_for(0.2))
        writer.finish()
        beside.append(f"with {threads} threads at {statistics.median(rates) / alone:.0%}")
    yield ""
    yield f"Read back: {'equal bit for bit' if same else 'DIFFERENT'}. While one is written, matrix products on the {CORES} cores run {', '.join(beside)} of their"
    yield "speed alone: a thread on every core waits for the one whose core the writer has."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tell(benchmark(arguments, Path(folder)), arguments.output)


if __name__ == "__main__":
    main()
