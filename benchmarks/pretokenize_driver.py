"""Time and memory of pretokenization's driver at the scale of LAION-400M: 41,456 tars through a real Ray.

    python benchmarks/pretokenize_driver.py [--tars 41456 --output benchmarks/pretokenize_driver.md]

Every tar is opened, hashed, decoded, encoded and written by `data_prep/pretokenize.py`, but holds one tiny picture, and the visual tokenizer is
tiny too: what is measured is scheduling, not tensor work. Real tars of 10,000 pictures keep an actor busy for minutes each.
"""

import argparse
import datetime
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from memory_watch import MemoryWatch
from pretokenize_world import start_job, write_tars, write_tokenizers
from tables import tell

from lavit_dist.data.manifest import load_manifest
from lavit_dist.observe.job_progress import PROGRESS

CORES = len(os.sched_getaffinity(0))


def benchmark(arguments: argparse.Namespace, world: Path) -> Iterator[str]:
    """The lines of the report."""
    write_tokenizers(world, width=32, layers=1, image_size=28, patch_size=14)
    write_tars(world / "pairs", arguments.tars, 1, 32)
    start = time.monotonic()
    run_dir = world / "run"
    process = start_job(world, run_dir, f"ray.num_cpus={CORES}", f"ray.num_actors={CORES}", log=world / "job.log")
    watch = MemoryWatch(process.pid)
    watch.start()
    assert process.wait() == 0, (world / "job.log").read_text()[-4000:]
    seconds = time.monotonic() - start
    watch.over.set()
    reports = [json.loads(line) for line in (run_dir / PROGRESS).read_text().splitlines()]
    first, last = reports[len(reports) // 4], reports[-1]
    early = [report for report in reports if report["shards_done"] and report["time"] <= first["time"]]
    rate = (last["shards_done"] - first["shards_done"]) / (last["time"] - first["time"])
    shards = load_manifest(run_dir / "train").shards
    assert sum(shard.images for shard in shards) == arguments.tars
    start = time.monotonic()
    assert start_job(world, run_dir, f"ray.num_cpus={CORES}", log=world / "job.log").wait() == 0
    again = time.monotonic() - start
    yield f"# The driver of pretokenization, {datetime.datetime.now(tz=datetime.timezone.utc):%d %B %Y}"
    yield ""
    yield f"{CORES} CPU cores, {arguments.tars:,} tars of one picture each, {len(shards):,} id shards. Made by `benchmarks/pretokenize_driver.py`."
    yield "The scheduling is real; pictures and model are tiny, so that there is hardly any tensor work."
    yield ""
    yield "| what | figure |"
    yield "| --- | --- |"
    yield f"| whole job | {seconds / 60:.1f} min |"
    yield f"| id shards per second after the first quarter of the reports; over that quarter | {rate:.1f}; {early[-1]['shards_done'] / (early[-1]['time'] - reports[0]['time'] or 1):.1f} |"
    yield f"| start on the finished set, which finds that nothing is left to do | {again:.0f} s |"
    for name, peak in sorted(watch.peaks.items()):
        yield f"| peak memory of {name}, its own | {peak:.0f} MiB |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tars", type=int, default=41_456)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tell(benchmark(arguments, Path(folder)), arguments.output)


if __name__ == "__main__":
    main()
