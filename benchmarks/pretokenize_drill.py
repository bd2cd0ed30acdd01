"""Faults at random moments of pretokenization, and whether the set comes out as if nothing had happened.

    python benchmarks/pretokenize_drill.py [--faults 30 --seed 0 --kinds driver actor … --output benchmarks/pretokenize_drill.md]

For each fault the job is started afresh, the fault happens, and the job is started again until it ends well. Then its manifest must be the
undisturbed run's to the byte, no temporary file may be left, and every sample of every tar must be in exactly one of the shards, the
quarantine files and what the filter leaves out. The tars have defects of all kinds. Kinds of faults:

driver, actor, decoder, writer    SIGKILL of that process
node                              SIGKILL of a node of a Ray cluster of three on this machine
disk                              the disk of the output is full (a small tmpfs: takes root)
truncated                         a tar is cut short, and put back before the next start
twice                             the same job is started while it runs
"""

import argparse
import dataclasses
import datetime
import json
import os
import random
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
from pretokenize_world import add_defects, start_job, write_tars, write_tokenizers
from tables import tell

from lavit_dist.data.id_shard import IdShard
from lavit_dist.data.manifest import MANIFEST, load_manifest
from lavit_dist.data.quarantine import read_quarantine
from lavit_dist.data.tar_reader import key_and_suffix

PROCESSES = {"actor": "ray::PretokenizeWorker", "decoder": "ray::PairReader", "writer": "ray::ShardWriter"}
KINDS = ("driver", *PROCESSES, "node", "disk", "truncated", "twice")
SETTINGS = [
    "inputs_per_shard=2",
    "batch_size=8",
    "filter.similarity.min=0.25",
    "filter.similarity.missing=keep",
    "report_seconds=1",
]
MOST_STARTS = 4
LEAST_SIMILARITY = 0.25


@dataclasses.dataclass
class Drill:
    """One world, one undisturbed result, and many ways to disturb."""

    world: Path
    random: random.Random
    manifest: bytes = b""
    seconds: float = 0.0
    """Of the undisturbed run."""
    cluster_address: str | None = None

    def start(self) -> subprocess.Popen[bytes]:
        """Starts the job as it is, or goes on with it."""
        if self.cluster_address:
            where = [f"ray.address={self.cluster_address}", "ray.num_actors=2"]
        else:
            where = ["ray.num_cpus=2", "ray.num_actors=2"]
        return start_job(self.world, self.run_dir, *SETTINGS, *where, log=self.world / "job.log")

    @property
    def run_dir(self) -> Path:
        return self.world / "run"

    def undisturbed(self) -> None:
        """Takes the result that all others must equal."""
        start = time.monotonic()
        assert self.start().wait() == 0, (self.world / "job.log").read_text()[-4000:]
        self.seconds = time.monotonic() - start
        self.manifest = (self.run_dir / "train" / MANIFEST).read_bytes()
        assert not self.flaw()
        self.clear()

    def clear(self) -> None:
        """Removes the run, but not the folder, which may be a file system of its own."""
        for path in self.run_dir.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def wait_for_work(self, process: subprocess.Popen[bytes], most: float) -> None:
        """Until a shard is being made, and a random while longer, of `most` seconds at most."""
        while not list(processes_called(PROCESSES["writer"])) and process.poll() is None:
            time.sleep(0.05)
        time.sleep(self.random.uniform(0, most))

    def disturb(self, kind: str) -> str:
        """Starts the job and lets the fault happen; what was seen."""
        process = self.start()
        self.wait_for_work(process, 0 if kind == "twice" else 0.5 * self.seconds)
        seen = ""
        if kind == "driver":
            process.kill()
        elif kind in PROCESSES:
            victims = list(processes_called(PROCESSES[kind]))
            for victim in self.random.sample(victims, min(1, len(victims))):
                victim.send_signal(signal.SIGKILL)
            seen = "" if victims else "all had been done, "
        elif kind == "truncated":
            return self._truncate(process)
        elif kind == "twice":
            second = self.start()
            seen = f"the second ended with {second.wait()}, "
        return f"{seen}the first ended with {process.wait()}"

    def _truncate(self, process: subprocess.Popen[bytes]) -> str:
        tar = self.random.choice(sorted((self.world / "pairs").glob("*.tar")))
        whole = tar.read_bytes()
        os.truncate(tar, self.random.randrange(len(whole)))
        code = process.wait()
        temporary = tar.with_suffix(".whole")
        temporary.write_bytes(whole)
        temporary.rename(tar)
        return f"the first ended with {code}"

    def recover(self) -> int:
        """Starts it again until it ends well; how often that took."""
        for number in range(1, MOST_STARTS + 1):
            if self.start().wait() == 0:
                return number
        raise AssertionError((self.world / "job.log").read_text()[-4000:])

    def flaw(self) -> str | None:
        """What is wrong with the result."""
        folder = self.run_dir / "train"
        if (folder / MANIFEST).read_bytes() != self.manifest:
            return "another manifest"
        left = [path.name for path in self.run_dir.rglob(".*.tmp")]
        if left:
            return f"left behind: {left}"
        outcomes: Counter[tuple[str, str]] = Counter()
        for record in load_manifest(folder).shards:
            shard = IdShard(folder / record.name)
            outcomes.update(set(zip(shard.column("source_shard"), shard.column("key"), strict=True)))
            refused = read_quarantine((folder / record.name).with_suffix(".quarantine.jsonl"))
            outcomes.update((found.shard or "", found.key) for found in refused if found.shard)
            if record.outcomes.samples != record.images + sum(
                (Counter(record.outcomes.quarantined) + Counter(record.outcomes.filtered)).values()
            ):
                return f"the counts of {record.name} don't add up"
        outcomes.update(self._filtered())
        expected = Counter(self._samples())
        if outcomes != expected:
            return f"lost {dict(expected - outcomes)}, too many {dict(outcomes - expected)}"
        return None

    def _samples(self) -> Iterator[tuple[str, str]]:
        for path in sorted((self.world / "pairs").glob("*.tar")):
            with tarfile.open(path) as tar:
                yield from {(path.name, (key_and_suffix(name) or (name,))[0]) for name in tar.getnames()}

    def _filtered(self) -> Iterator[tuple[str, str]]:
        for path in sorted((self.world / "pairs").glob("*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    file = tar.extractfile(member) if member.name.endswith(".json") else None
                    if file is not None and _similarity(file.read()) < LEAST_SIMILARITY:
                        yield path.name, member.name.removesuffix(".json")


def _similarity(data: bytes) -> float:
    """Of a .json; those that can't be read are quarantined, not filtered."""
    try:
        return float(json.loads(data)["similarity"])
    except (ValueError, KeyError, TypeError):
        return 1.0


def processes_called(title: str) -> Iterator[psutil.Process]:
    """Processes of Ray that do something."""
    for process in psutil.process_iter(["cmdline"]):
        if " ".join(process.info["cmdline"] or ()).startswith(title):
            yield process


def on_a_small_disk(drill: Drill) -> str:
    """The output's file system has room for half of it, and then for all."""
    size = sum(path.stat().st_size for path in drill.run_dir.rglob("*") if path.is_file()) or 1 << 20
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(drill.run_dir)], check=True)
    filler = drill.run_dir / "filler"
    room = drill.random.randrange(1 << 14, 1 << 16)
    filler.write_bytes(bytes((64 << 20) - max(room, size % (1 << 16))))
    code = drill.start().wait()
    filler.unlink()
    return f"the first ended with {code}"


def with_a_node_less(drill: Drill) -> str:
    """A cluster of a head without CPUs and two nodes, of which one is killed."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=200 << 20) for _ in range(2)]
    drill.cluster_address = cluster.address
    try:
        process = drill.start()
        drill.wait_for_work(process, 0.5 * drill.seconds)
        cluster.remove_node(drill.random.choice(nodes), allow_graceful=False)
        return f"the job ended with {process.wait()}"
    finally:
        drill.cluster_address = None
        cluster.shutdown()


def run(arguments: argparse.Namespace, world: Path) -> Iterator[str]:
    """The lines of the report."""
    write_tokenizers(world, width=64, layers=2, image_size=56, patch_size=14)
    write_tars(world / "pairs", 12, arguments.pairs_per_tar, 256)
    add_defects(world / "pairs")
    chance = random.Random(arguments.seed)
    drill = Drill(world, chance)
    drill.undisturbed()
    yield f"# Fault drill of pretokenization, {datetime.datetime.now(tz=datetime.timezone.utc):%d %B %Y}"
    yield ""
    yield f"{arguments.faults} faults at random moments, seed {arguments.seed}; the undisturbed run takes {drill.seconds:.0f} s. Made by `benchmarks/pretokenize_drill.py`."
    yield ""
    yield "| fault | what happened | starts until it ended well | the set |"
    yield "| --- | --- | --- | --- |"
    failed = 0
    kinds = [arguments.kinds[place % len(arguments.kinds)] for place in range(arguments.faults)]
    chance.shuffle(kinds)
    for kind in kinds:
        special = {"disk": on_a_small_disk, "node": with_a_node_less}.get(kind)
        seen = special(drill) if special else drill.disturb(kind)
        starts = drill.recover()
        flaw = drill.flaw()
        failed += flaw is not None
        yield f"| {kind} | {seen} | {starts} | {flaw or 'as undisturbed'} |"
        if kind == "disk":
            subprocess.run(["umount", str(drill.run_dir)], check=True)
        drill.clear()
    yield ""
    yield f"{failed} of {arguments.faults} sets differ."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--pairs-per-tar", type=int, default=300)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tell(run(arguments, Path(folder)), arguments.output)


if __name__ == "__main__":
    main()
