"""Faults at random moments of pretraining, tokenizer and decoder training, and whether each run ends as if nothing had happened.

    python benchmarks/fault_drill.py [--faults 200 --seed 0 --trainings pretrain … --kinds rank save … --output benchmarks/fault_drill.md]

Each training runs once undisturbed, on two processes, and then under `launcher/supervise.py`, which alone starts it again: between two faults
nobody does anything. In the end every step's record (loss, gradient norm, learning rate, work done) and every byte of the last checkpoint (weights,
masters, moments, place in the data) must be the undisturbed run's. The gradients of some steps are made NaN on one rank in both runs, and skipped;
these count as faults of the kind nan. The others:

rank        SIGKILL of a random rank                    save      the same while a checkpoint is being written
launcher    SIGKILL of DeepSpeed's launcher             term      SIGTERM of it
hang        SIGSTOP of a random rank                    cut       a file of the newest checkpoint is cut short, then SIGKILL of a rank
flip        one bit of such a file is flipped, too      disk      no room in the run folder until a checkpoint has failed (a small tmpfs: takes root)
"""

import argparse
import dataclasses
import datetime
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml
from drill_world import ROOT, make_world, settings_of
from tables import tell

from lavit_dist.observe.metrics import METRICS_FILE, read_lines
from lavit_dist.parallel.distributed import free_port

TRAININGS = {"pretrain": "pretrain.py", "tokenizer": "train_tokenizer.py", "decoder": "train_decoder.py"}
KINDS = ("rank", "save", "launcher", "term", "hang", "cut", "flip", "disk")
GOES_ON = ("disk",)
"""Kinds after which the run goes on without a new start."""
RANKS = 2
HANG_SECONDS = 8.0
PATIENCE = 240.0
"""Seconds in which something must happen after a fault."""
UNLIKE = ("seconds", "data_wait", "data_wait_seconds", "memory_gib", "features_remembered", "mfu")
"""What records hold of a run's speed."""
TMPFS_BYTES = 256 << 20


@dataclasses.dataclass
class Run:
    """A run of one training under the supervisor."""

    name: str
    world: Path
    run_dir: Path
    poisoned: str
    """Its steps with a gradient that is made NaN."""
    process: subprocess.Popen[bytes] | None = None

    def start(self, attempts: int = 1000) -> None:
        """Starts it as a user would."""
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(RANKS), "--master_port", str(free_port())]
        program = [*launcher, "benchmarks/poisoned.py", f"launcher/{TRAININGS[self.name]}"]
        training = [*program, "--config", str(self.world / f"{self.name}.yaml"), f"run_dir={self.run_dir}"]
        supervisor = [sys.executable, "launcher/supervise.py", "--attempts", str(attempts), "--wait", "0", "--", *training]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "POISONED_STEPS": self.poisoned}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(supervisor, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)

    @property
    def log(self) -> Path:
        return self.run_dir.with_suffix(".log")

    @property
    def over(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        assert self.process is not None, "it was never started"
        return self.process.wait()

    def steps(self) -> int:
        """How many steps its records show."""
        lines = read_lines(self.run_dir / METRICS_FILE)
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def processes(self, word: str) -> list[psutil.Process]:
        """Those of this run whose command line holds `word`."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if (
                any(str(self.run_dir) in part for part in line)
                and any(word in part for part in line)
                and process.pid != os.getpid()
            ):
                found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        return self.processes("--local_rank=")

    def starts(self) -> int:
        """How often a training has begun or resumed."""
        path = self.run_dir / "events.jsonl"
        return sum('"started"' in line for line in path.read_text().splitlines()) if path.exists() else 0

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]


class Drill:
    """Disturbs a run until it is over, or has had its share of faults."""

    def __init__(self, run: Run, chance: random.Random, save_every: int) -> None:
        self.run, self.chance, self.save_every = run, chance, save_every
        self.done: Counter[str] = Counter()

    def disturb(self, kinds: Sequence[str], faults: int) -> None:
        """So many faults of random kinds, each once the run has got a random number of steps on from where it was started."""
        self.run.start()
        begun = 0
        while self.done.total() < faults:
            self._wait_for_steps(begun, self.chance.randint(1, self.save_every + 2))
            if self.run.over:
                return
            begun = self.run.starts()
            time.sleep(self.chance.uniform(0, 0.3))
            kind = self.chance.choice(kinds)
            if getattr(self, f"_{kind}")():
                self.done[kind] += 1
                begun -= kind in GOES_ON
            else:  # what was to be harmed wasn't there
                begun -= 1
        self._wait(lambda: self.run.over, "its end", seconds=20 * PATIENCE)

    def _wait_for_steps(self, begun: int, steps: int) -> None:
        """Until a start after number `begun` has taken so many steps."""
        self._wait(lambda: self.run.over or self.run.starts() > begun, "the next start")
        first = self.run.steps()
        self._wait(lambda: self.run.over or self.run.steps() >= first + steps, "its steps")

    def _wait(self, condition: Any, what: str, seconds: float = PATIENCE) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{self.run.name}: waited {seconds:.0f} s for {what}\n{self.run.tail()}"
            time.sleep(0.05)

    def _signal(self, victims: list[psutil.Process], number: signal.Signals) -> bool:
        if not victims:
            return False
        try:
            self.chance.choice(victims).send_signal(number)
        except psutil.NoSuchProcess:
            return False
        return True

    def _rank(self) -> bool:
        return self._signal(self.run.ranks(), signal.SIGKILL)

    def _save(self) -> bool:
        folder = self.run.run_dir / "checkpoints"
        self._wait(lambda: self.run.over or list(folder.glob(".step-*.tmp")), "a checkpoint to be written")
        return self._rank()

    def _launcher(self) -> bool:
        return self._signal(self.run.processes("deepspeed.launcher.launch"), signal.SIGKILL)

    def _term(self) -> bool:
        return self._signal(self.run.processes("deepspeed.launcher.launch"), signal.SIGTERM)

    def _hang(self) -> bool:
        return self._signal(self.run.ranks(), signal.SIGSTOP)

    def _cut(self) -> bool:
        return self._harm(lambda path: os.truncate(path, self.chance.randrange(path.stat().st_size)))

    def _flip(self) -> bool:
        def flip(path: Path) -> None:
            content = bytearray(path.read_bytes())
            content[self.chance.randrange(len(content))] ^= 1 << self.chance.randrange(8)
            path.write_bytes(content)

        return self._harm(flip)

    def _harm(self, do: Any) -> bool:
        """Harms the newest checkpoint and kills a rank, so that it is wanted; one before it must be there to go back to."""
        steps = sorted((self.run.run_dir / "checkpoints").glob("step-*"))
        if len(steps) < 2:
            return False
        for rank in self.run.ranks():  # so that no newer one takes its place meanwhile
            rank.suspend()
        files = [path for path in sorted(steps[-1].rglob("*")) if path.is_file() and path.stat().st_size]
        do(self.chance.choice(files))
        killed = self._rank()
        for rank in self.run.ranks():
            rank.resume()
        return killed

    def _disk(self) -> bool:
        failed = self.run.log.read_text(errors="replace").count("couldn't be written")
        filler = self.run.run_dir / "filler"
        try:
            with filler.open("wb") as file:
                while True:
                    file.write(bytes(1 << 16))
        except OSError:
            pass
        self._wait(
            lambda: self.run.over or self.run.log.read_text(errors="replace").count("couldn't be written") > failed, "a failed save"
        )
        filler.unlink()
        return not self.run.over


def records(run_dir: Path) -> list[dict[str, Any]]:
    """A run's records without what its speed decides, as text, since NaN is not equal to itself."""
    kept = []
    for line in read_lines(run_dir / METRICS_FILE):
        kept.append({name: repr(value) for name, value in json.loads(line).items() if name not in UNLIKE})
    return kept


def digests(run_dir: Path) -> dict[str, str]:
    """The sha256 of each file of the last checkpoint."""
    folder = run_dir / "checkpoints" / (run_dir / "checkpoints/latest").read_text()
    return {name: record["sha256"] for name, record in json.loads((folder / "manifest.json").read_text())["files"].items()}


def flaw(straight: Path, disturbed: Run) -> str:
    """In what a disturbed run differs, or nothing."""
    if disturbed.wait() != 0 or not (disturbed.run_dir / "model").exists():
        return f"ended with {disturbed.wait()}: {disturbed.tail()[-300:]}"
    expected, found = records(straight), records(disturbed.run_dir)
    if [record["step"] for record in found] != [record["step"] for record in expected]:
        return "other steps"
    for there, here in zip(expected, found, strict=True):
        if there != here:
            names = [name for name in there if there[name] != here.get(name)]
            return f"step {there['step']} differs in {', '.join(names)}"
    if digests(straight) != digests(disturbed.run_dir):
        return "another last checkpoint"
    return ""


def drill(arguments: argparse.Namespace, world: Path) -> Iterator[str]:
    """The lines of the report."""
    make_world(world)
    chance = random.Random(arguments.seed)
    disks = "disk" in arguments.kinds and os.geteuid() == 0
    kinds = [kind for kind in arguments.kinds if kind != "disk" or disks]
    yield f"# Fault drill of training, {datetime.datetime.now(tz=datetime.timezone.utc):%d %B %Y}"
    yield ""
    yield f"At least {arguments.faults} faults at random moments, seed {arguments.seed}; {RANKS} processes, runs of {arguments.steps} steps with a checkpoint"
    yield f"every {arguments.save_every}, under `launcher/supervise.py`. A hang is seen after {HANG_SECONDS:.0f} s. Made by `benchmarks/fault_drill.py`."
    yield ""
    yield "| run | faults | of which | minutes | compared with the undisturbed run |"
    yield "| --- | --- | --- | --- | --- |"
    straight: dict[str, Run] = {}
    total: Counter[str] = Counter()
    failed = number = 0
    while total.total() < arguments.faults:
        name = arguments.trainings[number % len(arguments.trainings)]
        if name not in straight:
            settings = settings_of(name, world, arguments.steps, arguments.save_every, HANG_SECONDS)
            (world / f"{name}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
            # Engines count their own steps: the first number is met in each phase of a tokenizer, the second perhaps in none.
            poisoned = ",".join(str(chance.randrange(2, most)) for most in (arguments.steps // 4, arguments.steps - 2))
            straight[name] = Run(name, world, world / f"{name}-straight", poisoned)
            straight[name].start(attempts=1)
            assert straight[name].wait() == 0, straight[name].tail()
        begin = time.monotonic()
        run = Run(name, world, world / f"{name}-{number}", straight[name].poisoned)
        run.run_dir.mkdir()
        if disks:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(run.run_dir)], check=True)
        try:
            disturbing = Drill(run, chance, arguments.save_every)
            disturbing.disturb(kinds, min(arguments.per_run, arguments.faults - total.total()))
            told = [json.loads(line) for line in (run.run_dir / "events.jsonl").read_text().splitlines()]
            disturbing.done["nan"] = len({event["step"] for event in told if event["event"] == "bad step"})
            run.wait()
            found = flaw(straight[name].run_dir, run)
        finally:
            for process in [*run.processes("supervise.py"), *run.processes("launch"), *run.ranks()]:
                process.kill()
            if disks:
                subprocess.run(["umount", "-l", str(run.run_dir)], check=True)
        failed += bool(found)
        total += disturbing.done
        of_which = ", ".join(f"{count} {kind}" for kind, count in sorted(disturbing.done.items()))
        minutes = (time.monotonic() - begin) / 60
        yield f"| {name} | {disturbing.done.total()} | {of_which} | {minutes:.1f} | {found or 'the same, bit for bit'} |"
        number += 1
    yield f"| all {number} | {total.total()} | {', '.join(f'{count} {kind}' for kind, count in sorted(total.items()))} | | {failed} differ |"
    if failed:
        raise SystemExit("Some runs differ.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--per-run", type=int, default=20, help="faults of one run at most, NaNs aside")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trainings", nargs="+", choices=TRAININGS, default=list(TRAININGS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--world", type=Path, help="a folder to keep; a temporary one otherwise")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.world:
        arguments.world.mkdir(parents=True, exist_ok=True)
        tell(drill(arguments, arguments.world), arguments.output)
    else:
        with tempfile.TemporaryDirectory() as folder:
            tell(drill(arguments, Path(folder)), arguments.output)


if __name__ == "__main__":
    main()
