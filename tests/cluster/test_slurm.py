"""The Slurm scripts on a real Slurm of one node: preempted, requeued, and done with the losses of an undisturbed run. Takes root."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lavit_dist.engine.events import EVENTS
from lavit_dist.observe.metrics import METRICS_FILE, read_lines
from lavit_dist.parallel.distributed import free_port

ROOT = Path(__file__).parents[2]
SLURM = Path(__file__).with_name("one_node_slurm.sh")
STEPS, TIMEOUT = 60, 150
REPEATED = ("step", "loss", "grad_norm", "learning_rate", "tokens")
SCRIPTS = sorted((ROOT / "launcher/slurm").glob("*.sbatch"))
needs_slurm = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("sbatch") is None,
    reason="a Slurm of one's own takes root, and apt-get install slurm-wlm munge",
)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which sbatch and its like speak to a Slurm of this test's own."""
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([SLURM, "start", folder], check=True, timeout=120)
    yield {
        **os.environ,
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PYTHON": sys.executable,
        "PROCESSES_PER_NODE": "2",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([SLURM, "stop", folder], check=True)


def records(run_dir: Path) -> list[dict[str, float]]:
    return [{name: record[name] for name in REPEATED} for record in map(json.loads, read_lines(run_dir / METRICS_FILE))]


def events(run_dir: Path) -> list[str]:
    path = run_dir / EVENTS
    return [json.loads(line)["event"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def config(pretrain_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "pretrain.yaml"
    settings = pretrain_settings | {
        "parallel": {"pipeline_parallel_size": 2},
        "checkpoint": {"every_steps": 10},
        "logging": {"tensorboard": False},
        "total_steps": STEPS,
    }
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The records of the run without Slurm."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(free_port())]
    command = [*launcher, "launcher/pretrain.py", "--config", str(config), f"run_dir={run_dir}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return records(run_dir)


@needs_slurm
@pytest.mark.xdist_group("slurm")
@pytest.mark.timeout(500)
@pytest.mark.parametrize("launcher", ["deepspeed", "srun"])
def test_a_job_that_is_preempted_and_requeued_ends_as_if_it_had_not_been(
    slurm: dict[str, str], config: Path, undisturbed: list[dict[str, float]], tmp_path: Path, launcher: str
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "job.log"
    arguments = [f"--output={log}", "--nodes=1", "--cpus-per-task=2", "launcher/slurm/pretrain.sbatch"]
    training = ["--config", str(config), f"run_dir={run_dir}"]
    submitted = subprocess.run(
        ["sbatch", "--parsable", *arguments, *training],
        cwd=ROOT, env=slurm | {"LAUNCHER": launcher}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()

    def call(*command: str) -> str:
        return subprocess.run(command, env=slurm, capture_output=True, text=True, check=True).stdout

    def wait(condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < end, f"waited for {what}\n{call('squeue')}\n{log.read_text() if log.exists() else ''}"
            time.sleep(0.2)

    def steps() -> int:
        return len(read_lines(run_dir / METRICS_FILE))

    wait(lambda: steps() >= 5, "the first steps")
    call("scancel", "--signal=USR1", "--batch", job)  # as Slurm does before the time limit
    wait(lambda: "stopped" in events(run_dir), "a stop")
    stopped_at = steps()
    assert stopped_at < STEPS
    wait(lambda: steps() >= stopped_at + 4 and events(run_dir).count("started") == 2, "steps of the second start")
    call("scontrol", "requeue", job)  # as preemption does: no time for a checkpoint
    wait((run_dir / "model").exists, "the end")
    wait(
        lambda: call("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T").strip() in ("COMPLETED", ""), "its end"
    )
    assert events(run_dir).count("started") == 3
    assert records(run_dir) == undisturbed


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_dry_run_says_what_would_run(script: Path) -> None:
    assert len(script.read_text().splitlines()) <= 60
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    for launcher in ("deepspeed", "srun"):
        environment = plain | {"DRY_RUN": "1", "PROCESSES_PER_NODE": "4", "LAUNCHER": launcher, "PYTHON": "python"}
        command = ["bash", str(script), "--config", "my config.yaml", "run_dir=runs/x"]
        said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
        assert r"--config my\ config.yaml run_dir=runs/x" in said
        program = "data_prep/pretokenize.py" if script.stem == "ray_pretokenize" else f"launcher/{script.stem}.py"
        assert program in said
        if script.stem != "ray_pretokenize":
            assert ("deepspeed.launcher.runner" in said) == (launcher == "deepspeed")


def test_wrong_variables_are_refused() -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "PROCESSES"))}
    for given, said in (({}, "the job has no GPUs"), ({"PROCESSES_PER_NODE": "2", "LAUNCHER": "mpi"}, "LAUNCHER is mpi; choose")):
        command = ["bash", "launcher/slurm/pretrain.sbatch", "run_dir=runs/x"]
        run = subprocess.run(command, cwd=ROOT, env=plain | given, capture_output=True, text=True, check=False)
        assert run.returncode == 2
        assert said in run.stderr
