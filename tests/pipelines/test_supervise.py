"""The supervisor: when it starts a command again, when it gives up, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipelines.supervise import REPORT, meaning

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, os, subprocess, sys, time
from pathlib import Path
run_dir, plan = Path(sys.argv[1].partition("=")[2]), json.loads(sys.argv[2])
run_dir.mkdir(exist_ok=True)
starts = run_dir / "starts"
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (number + 1))
step, checkpoint, end = plan[min(number, len(plan) - 1)]
def tell(event):
    with (run_dir / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": event}) + "\\n")
if end == "early":
    sys.exit(1)
tell("started")
(run_dir / "checkpoints").mkdir(exist_ok=True)
(run_dir / "checkpoints/latest").write_text(f"step-{checkpoint:08d}")
with (run_dir / "metrics.jsonl").open("a") as file:
    file.write("\\n" + json.dumps({"step": step}) + "\\n" + '{"step"')
print(f"start {number} got to step {step}", flush=True)
if end == "orphan":
    print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"]).pid, flush=True)
    end = 1
if end == "until stopped":
    while not (run_dir / "stop").exists():
        time.sleep(0.05)
    (run_dir / "stop").unlink()
    tell("stopped")
    sys.exit(0)
if end == 0:
    (run_dir / "model").mkdir()
if end == "lying":
    tell("done")
    end = 0
if end == "deaf":
    time.sleep(100)
if end < 0:
    os.kill(os.getpid(), -end)
sys.exit(end)
"""


def supervised(run_dir: Path, plan: list, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "launcher/supervise.py", "--wait", "0", *options, "--"]
    program = [sys.executable, "-c", PROGRAM, f"run_dir={run_dir}", json.dumps(plan)]
    return subprocess.Popen([*command, *program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(run_dir: Path, plan: list, *options: str) -> tuple[int, str]:
    process = supervised(run_dir, plan, *options)
    said, _ = process.communicate(timeout=60)
    return process.returncode, said


def starts(run_dir: Path) -> int:
    return len((run_dir / "starts").read_text())


def test_faults_are_followed_by_starts_until_it_is_done(tmp_path: Path) -> None:
    code, said = run(tmp_path / "run", [(5, 4, 1), (9, 8, -9), (12, 12, 74), (13, 12, "lying"), (20, 20, 0)])
    assert code == 0
    assert starts(tmp_path / "run") == 5
    assert "it ended before it was done (exit code 0)" in said
    assert "start 4 got to step 20" in said
    assert "it was ended by SIGKILL (often the kernel's, for want of memory; dmesg tells) after step 9; starting again" in said
    assert not (tmp_path / "run" / REPORT).exists()


def test_a_step_that_fails_again_and_again_is_given_up_with_a_report(tmp_path: Path) -> None:
    code, said = run(tmp_path / "run", [(5, 4, 1), (7, 4, 1)], "--attempts", "3")
    assert code == 1
    assert starts(tmp_path / "run") == 4
    assert "given up: it failed 3 times after step 7" in said
    report = (tmp_path / "run" / REPORT).read_text()
    assert "Newest checkpoint: step-00000004" in report
    assert report.count("after step 7: it failed (exit code 1)") == 3
    assert report.endswith("start 3 got to step 7\n")


def test_starts_that_bring_no_checkpoint_are_given_up_too(tmp_path: Path) -> None:
    code, said = run(tmp_path / "run", [(step, 0, 1) for step in range(30)], "--attempts", "2")
    assert code == 1
    assert "given up: it failed 8 times in a row without a new checkpoint" in said


def test_starts_that_take_no_step_are_not_counted_as_faults_at_one(tmp_path: Path) -> None:
    code, said = run(tmp_path / "run", [(5, 4, 1), *[(5, 4, "early")] * 5, (9, 8, 0)], "--attempts", "2")
    assert code == 0
    assert starts(tmp_path / "run") == 7
    code, said = run(tmp_path / "other", [(5, 4, "early")], "--attempts", "2")
    assert code == 1
    assert "in a row without a new checkpoint" in said


def test_an_earlier_stop_is_not_taken_for_the_end(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/events.jsonl").write_text(json.dumps({"event": "stopped"}) + "\n")
    code, _ = run(tmp_path / "run", [(5, 4, "lying"), (9, 8, 0)])
    assert code == 0
    assert starts(tmp_path / "run") == 2


def test_wrong_settings_are_not_tried_again(tmp_path: Path) -> None:
    code, said = run(tmp_path / "run", [(0, 0, 2)])
    assert code == 2
    assert starts(tmp_path / "run") == 1
    assert "the settings are wrong, or need a decision" in said
    command = [
        sys.executable,
        "launcher/supervise.py",
        "--",
        sys.executable,
        "-c",
        "raise SystemExit(2)",
        f"run_dir={tmp_path}/none",
    ]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "given up: the settings are wrong" in refused.stdout
    assert not (tmp_path / "none").exists()


def test_what_a_killed_launcher_leaves_is_ended_before_the_next_start(tmp_path: Path) -> None:
    code, said = run(tmp_path / "run", [(5, 4, "orphan"), (9, 8, 0)])
    assert code == 0
    orphan = int(next(line for line in said.splitlines() if line.isdigit()))
    assert not psutil.pid_exists(orphan) or psutil.Process(orphan).status() == psutil.STATUS_ZOMBIE


def wait_for_start(run_dir: Path) -> None:
    end = time.monotonic() + 30
    while not (run_dir / "metrics.jsonl").exists():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_asks_the_run_to_stop(tmp_path: Path, number: signal.Signals) -> None:
    process = supervised(tmp_path / "run", [(5, 4, "until stopped")])
    wait_for_start(tmp_path / "run")
    process.send_signal(number)
    assert process.wait(timeout=30) == 0
    assert starts(tmp_path / "run") == 1
    assert not (tmp_path / "run/stop").exists()


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    process = supervised(tmp_path / "run", [(5, 4, "deaf")])
    wait_for_start(tmp_path / "run")
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert process.wait(timeout=30) == 143
    assert not (tmp_path / "run/stop").exists()
    (tmp_path / "run/stop").touch()
    code, _ = run(tmp_path / "run", [(5, 4, 0), (9, 8, 0)])  # an old request is not one of the next start
    assert code == 0
    assert not (tmp_path / "run/stop").exists()


def test_a_command_without_a_run_folder_is_refused() -> None:
    command = [sys.executable, "launcher/supervise.py"]
    for words, said in (
        (["--", "true"], "doesn't say run_dir="),
        ([], "There is no command"),
        (["--", "nosuchprogram", "run_dir=x"], "The command nosuchprogram isn't found"),
    ):
        refused = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ), check=False)
        assert refused.returncode == 2
        assert said in refused.stderr


def test_exit_codes_in_words() -> None:
    assert meaning(74) == "it hung (exit code 74)"
    assert "SIGKILL" in meaning(-9)
    assert "SIGKILL" in meaning(137)
    assert "SIGKILL" in meaning(247)
    assert meaning(3) == "it ended (exit code 3)"
