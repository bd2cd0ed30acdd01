"""launcher/pretrain.py as a user starts it: killed in the middle, started again, and refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from transformers import LlamaForCausalLM

from lavit_dist.observe.metrics import METRICS_FILE, read_lines
from lavit_dist.parallel.distributed import free_port

STEPS, SAVE_EVERY, KILL_AFTER = 30, 5, 8
REPEATED = ("step", "loss", "text_loss", "image_loss", "grad_norm", "learning_rate", "tokens", "padding")
TIMEOUT = 180
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config_file(pretrain_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run on tensor 2 x pipeline 2."""
    path = tmp_path_factory.mktemp("config") / "pretrain.yaml"
    settings = pretrain_settings | {
        "parallel": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
        "checkpoint": {"every_steps": SAVE_EVERY},
        "logging": {"every_steps": 10},
        "total_steps": STEPS,
    }
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def start(repo_root: Path, config_file: Path) -> Callable[..., subprocess.Popen[str]]:
    """`start(processes, *overrides)`: the command that the README gives."""

    def begin(processes: int, *overrides: str) -> subprocess.Popen[str]:
        launcher = [
            str(Path(sys.executable).with_name("deepspeed")),
            "--num_gpus",
            str(processes),
            "--master_port",
            str(free_port()),
        ]
        command = [*launcher, "launcher/pretrain.py", "--config", str(config_file), *overrides]
        return subprocess.Popen(command, cwd=repo_root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return begin


def finish(run: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code and what it said."""
    try:
        said, _ = run.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        for process in psutil.Process(run.pid).children(recursive=True):
            process.kill()
        run.kill()
        pytest.fail(f"not done after {TIMEOUT} s:\n{run.communicate()[0]}")
    return run.returncode, said


def records(run_dir: Path) -> list[dict[str, float]]:
    return [{name: record[name] for name in REPEATED} for record in map(json.loads, read_lines(run_dir / METRICS_FILE))]


def kill_a_rank(run: subprocess.Popen[str], run_dir: Path, local_rank: int) -> None:
    """Sends SIGKILL to one rank once the run is past its first checkpoint."""
    deadline = time.monotonic() + TIMEOUT
    while len(read_lines(run_dir / METRICS_FILE)) < KILL_AFTER:
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()[0]
        time.sleep(0.02)
    (rank,) = (
        process for process in psutil.Process(run.pid).children(recursive=True) if f"--local_rank={local_rank}" in process.cmdline()
    )
    os.kill(rank.pid, signal.SIGKILL)


def test_a_killed_run_goes_on_as_if_it_had_not_been(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    code, said = finish(start(4, f"run_dir={tmp_path}/straight"))
    assert code == 0, said
    straight = records(tmp_path / "straight")
    assert [record["step"] for record in straight] == list(range(1, STEPS + 1))

    killed = start(4, f"run_dir={tmp_path}/killed")
    kill_a_rank(killed, tmp_path / "killed", local_rank=2)
    assert finish(killed)[0] != 0
    assert KILL_AFTER <= len(records(tmp_path / "killed")) < STEPS
    assert not (tmp_path / "killed" / "model").exists()

    code, said = finish(start(4, f"run_dir={tmp_path}/killed"))
    assert code == 0, said
    assert "resumed from" in said
    assert records(tmp_path / "killed") == straight

    weights = [LlamaForCausalLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("straight", "killed")]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])

    # The last steps once more on half as many processes, cut otherwise.
    shutil.rmtree(tmp_path / "killed/model")
    shutil.rmtree(tmp_path / f"killed/checkpoints/step-{STEPS:08d}")
    (tmp_path / "killed/checkpoints/latest").write_text(f"step-{STEPS - SAVE_EVERY:08d}")
    cut = ("parallel.tensor_parallel_size=1", "parallel.pipeline_parallel_size=1", "parallel.zero_stage=2", "micro_batch_size=1")
    code, said = finish(start(2, f"run_dir={tmp_path}/killed", *cut))
    assert code == 0, said
    assert f"resumed from {tmp_path}/killed/checkpoints/step-{STEPS - SAVE_EVERY:08d}" in said
    reshaped = records(tmp_path / "killed")
    assert reshaped[:-SAVE_EVERY] == straight[:-SAVE_EVERY]
    for there, here in zip(straight[-SAVE_EVERY:], reshaped[-SAVE_EVERY:], strict=True):
        assert here == pytest.approx(there, rel=1e-5)

    check_the_commands_about_checkpoints(tmp_path / "straight", tmp_path)


def check_the_commands_about_checkpoints(run_dir: Path, tmp_path: Path) -> None:
    def call(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "launcher/checkpoint.py", *map(str, words)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False)

    newest = run_dir / f"checkpoints/step-{STEPS:08d}"
    said = call("inspect", newest).stdout
    assert f"steps taken {STEPS}" in " ".join(said.split())
    assert "written by 4 processes" in " ".join(said.split())
    assert "layout tensor_parallel_size 2, pipeline_parallel_size 2" in " ".join(said.split())
    settings = yaml.safe_load((run_dir / "config.yaml").read_text())
    exported = call("export", newest, "--text-tokenizer", settings["text_tokenizer"], "--output", tmp_path / "exported")
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "exported/model.safetensors").read_bytes() == (run_dir / "model/model.safetensors").read_bytes()
    assert call("verify", run_dir / "checkpoints").returncode == 0
    part = next(newest.rglob("part-00001.safetensors"))
    part.write_bytes(part.read_bytes()[:-1])
    damaged = call("verify", run_dir / "checkpoints")
    assert damaged.returncode == 1
    assert "part-00001.safetensors" in damaged.stdout
    assert call("inspect", tmp_path).returncode == 2
    assert call("prune", run_dir / "checkpoints", "--keep-last", "0").returncode == 2
    pruned = call("prune", run_dir / "checkpoints", "--keep-last", "1").stdout
    assert pruned == f"{newest.name} is damaged and removed, too\nremoved nothing\n"  # the one before it stays
    assert [step.name for step in (run_dir / "checkpoints").glob("step-*")] == [f"step-{STEPS - SAVE_EVERY:08d}"]


def test_under_the_launcher_a_mistake_is_one_sentence_and_exit_code_2(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    code, said = finish(start(3, f"run_dir={tmp_path}/run"))
    assert code == 2
    assert said.count("error: The 3 processes that were started can't be shared out") == 1
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_a_diverging_run_takes_no_such_step_and_is_given_up(repo_root: Path, config_file: Path, tmp_path: Path) -> None:
    alone = (
        "parallel.tensor_parallel_size=1",
        "parallel.pipeline_parallel_size=1",
        "optimizer.learning_rate=1e30",
        "faults.bad_steps=3",
    )
    command = [sys.executable, "launcher/pretrain.py", "--config", str(config_file), f"run_dir={tmp_path}/run", *alone]
    run = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert run.returncode == 2, run.stderr
    assert re.search("step 2 went wrong: its (loss|grad_norm) is (nan|inf)", run.stderr)
    assert "lower optimizer.learning_rate" in " ".join(run.stderr.split())
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
