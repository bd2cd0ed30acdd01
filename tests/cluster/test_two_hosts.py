"""Pretraining on two hosts, by one launcher on each and no ssh, and what happens when the cable between them is cut. Takes root."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from lavit_dist.observe.metrics import METRICS_FILE, read_lines
from lavit_dist.parallel.distributed import free_port

STEPS, HANG_SECONDS, TIMEOUT = 12, 8.0, 150
REPEATED = ("step", "loss", "grad_norm", "learning_rate", "tokens")
HOSTS = Path(__file__).with_name("two_hosts.sh")
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces take root, and ip of iproute2"),
    pytest.mark.xdist_group("two hosts"),
    pytest.mark.timeout(400),
]


@pytest.fixture
def hosts() -> Iterator[str]:
    name = f"l{os.getpid() % 100_000}"
    subprocess.run([HOSTS, "up", name], check=True)
    yield name
    subprocess.run([HOSTS, "down", name], check=True)


@pytest.fixture
def config(pretrain_settings: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "pretrain.yaml"
    settings = pretrain_settings | {
        "parallel": {"pipeline_parallel_size": 2},
        "checkpoint": {"every_steps": 4},
        "faults": {"hang_seconds": HANG_SECONDS},
        "total_steps": STEPS,
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def on_host(name: str, number: int, config: Path, run_dir: Path, port: int) -> subprocess.Popen[str]:
    """The launcher of one host, as Slurm's script and README start it."""
    hostfile = config.with_suffix(".hosts")
    hostfile.write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
    interface = f"{name}-{'ab'[number]}"
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", hostfile, "--no_ssh", "--node_rank", number]
    address = ["--master_addr", "10.77.0.1", "--master_port", port]
    program = ["launcher/pretrain.py", "--config", config, f"run_dir={run_dir}"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface}
    return subprocess.Popen(
        ["ip", "netns", "exec", interface, *map(str, [*launcher, *address, *program])],
        cwd=Path(__file__).parents[2],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(run: subprocess.Popen[str]) -> tuple[int, str]:
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


def test_two_hosts_train_as_one_and_survive_a_cut_cable(hosts: str, config: Path, tmp_path: Path) -> None:
    straight = tmp_path / "straight"
    alone = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(free_port())]
    command = [*alone, "launcher/pretrain.py", "--config", str(config), f"run_dir={straight}"]
    one_host = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert one_host.returncode == 0, one_host.stdout + one_host.stderr

    run_dir = tmp_path / "two"
    pair = [on_host(hosts, number, config, run_dir, 29411) for number in (0, 1)]
    end = time.monotonic() + TIMEOUT
    while len(read_lines(run_dir / METRICS_FILE)) < 6:
        assert time.monotonic() < end and all(run.poll() is None for run in pair), [finish(run)[1] for run in pair]
        time.sleep(0.01)
    for rank in _ranks(run_dir):
        rank.send_signal(signal.SIGSTOP)  # a step may be shorter than the cut takes
    subprocess.run([HOSTS, "cut", hosts], check=True)
    for rank in _ranks(run_dir):
        rank.send_signal(signal.SIGCONT)
    cut = time.monotonic()
    outcomes = [finish(run) for run in pair]
    assert time.monotonic() - cut < 6 * HANG_SECONDS
    assert all(code not in (0, 2) for code, _ in outcomes), outcomes
    told = "".join(said for _, said in outcomes)
    assert re.search(
        r"lost another process .*start the run again|Nothing has moved for 8 s \(faults.hang_seconds\) in step", told
    ), told
    assert not (run_dir / "model").exists()

    subprocess.run([HOSTS, "down", hosts], check=True)
    subprocess.run([HOSTS, "up", hosts], check=True)
    again = [finish(run) for run in [on_host(hosts, number, config, run_dir, 29412) for number in (0, 1)]]
    assert [code for code, _ in again] == [0, 0], again
    assert "resumed from" in "".join(said for _, said in again)
    assert records(run_dir) == records(straight)


def _ranks(run_dir: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if any("--local_rank=" in word for word in line) and f"run_dir={run_dir}" in line:
            found.append(process)
    return found
