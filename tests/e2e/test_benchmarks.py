"""The programs in benchmarks/ run; at toy size, for what they measure there says nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def test_tokenizer_inference_compares_both_sides_in_each_precision(repo_root, tmp_path):
    sizes = ["--width", "176", "--tower-layers", "1", "--merger-layers", "1", "--codes", "64", "--images", "2", "--batches", "2"]
    precisions = ["fp32", *(["bf16"] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else [])]
    sizes += ["--dtype", *precisions]
    command = [sys.executable, "benchmarks/tokenizer_inference.py", *sizes, "--rounds", "1", "--output", str(tmp_path / "table.md")]
    result = subprocess.run(command, cwd=repo_root, check=False, capture_output=True, text=True, timeout=170)
    assert result.returncode == 0, result.stderr
    table = (tmp_path / "table.md").read_text()
    assert [line[3:] for line in table.splitlines() if line.startswith("## ")] == precisions
    assert "100.00% of the ids are equal" in table.split("## bf16")[0]


def test_pretraining_sides_begin_with_the_same_loss(repo_root, tmp_path):
    sizes = [
        "--width",
        "64",
        "--layers",
        "2",
        "--heads",
        "2",
        "--hidden",
        "128",
        "--seq-len",
        "256",
        "--rows",
        "2",
        "--rounds",
        "1",
        "--precision",
        "fp32",
        "--sides",
        "ours",
        "HF, padded batches",
        "HF, packed rows",
        "megatron-core GPTModel",
    ]
    table = _run(repo_root, tmp_path, "pretrain.py", *sizes)
    losses = [
        float(line.split("|")[-2]) for line in table.splitlines() if line.startswith("| ") and line.rstrip(" |")[-1].isdigit()
    ]
    assert len(losses) == 4
    assert max(losses) - min(losses) < 1e-4


def test_no_rank_sends_more_than_its_layout_asks_for(repo_root, tmp_path):
    table = _run(repo_root, tmp_path, "communication.py", "--layouts", "t2z1", "d2z1", "p2z1")
    ratios = [float(line.split("|")[-3]) for line in table.splitlines() if line.startswith("| 2 ")]
    assert len(ratios) == 3
    assert all(ratio <= 1.05 for ratio in ratios), table


def test_the_pipeline_schedule_idles_no_longer_than_it_must(repo_root, tmp_path):
    table = _run(repo_root, tmp_path, "pipeline_bubble.py", "--stages", "2", "--micro-batches", "3")
    formula, replayed = table.splitlines()[-1].split("|")[3:5]
    assert float(formula) == float(replayed) == 0.25


def test_scaling_tables_without_their_check(repo_root, tmp_path):
    table = _run(repo_root, tmp_path, "scaling.py", "--no-check")
    assert sum(line.startswith("| 1,024 ") for line in table.splitlines()) == 4


def test_every_section_of_the_gpu_suite_runs_dry(repo_root, tmp_path):
    out = tmp_path / "gpu.md"
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["benchmarks/gpu_suite.sh", "--dry", str(out)]
    result = subprocess.run(command, cwd=repo_root, env=environment, check=False, capture_output=True, text=True, timeout=230)
    table = out.read_text()
    assert result.returncode == 0, result.stderr
    assert table.count("\n## ") == 4
    assert "failed" not in table
    assert "| NO |" not in table


def _run(repo_root: Path, tmp_path: Path, program: str, *arguments: str) -> str:
    """The table that a program of benchmarks/ leaves."""
    command = [sys.executable, f"benchmarks/{program}", *arguments, "--output", str(tmp_path / "table.md")]
    result = subprocess.run(command, cwd=repo_root, check=False, capture_output=True, text=True, timeout=230)
    assert result.returncode == 0, result.stderr
    return (tmp_path / "table.md").read_text()


def test_a_checkpoint_in_the_background_is_read_back_bit_for_bit(repo_root, tmp_path):
    table = _run(repo_root, tmp_path, "save_stall.py", "--megabytes", "32", "--repeats", "1")
    assert "Read back: equal bit for bit." in table
    assert table.count("| ours") == 2


@pytest.mark.timeout(500)
def test_faults_at_random_moments_leave_no_trace_in_what_is_trained(repo_root, tmp_path):
    """The drill, in short: two trainings, three faults each and NaNs. Hangs, which take long to be seen, are left to the whole one."""
    kinds = ["rank", "save", "launcher", "term", "cut", "flip", *(["disk"] if os.geteuid() == 0 else [])]
    sizes = [
        "--faults",
        "7",
        "--per-run",
        "3",
        "--steps",
        "120",
        "--save-every",
        "5",
        "--seed",
        "7",
        "--trainings",
        "pretrain",
        "tokenizer",
    ]
    command = [sys.executable, "benchmarks/fault_drill.py", *sizes, "--kinds", *kinds, "--output", str(tmp_path / "table.md")]
    result = subprocess.run(command, cwd=repo_root, check=False, capture_output=True, text=True, timeout=480)
    assert result.returncode == 0, result.stdout + result.stderr
    table = (tmp_path / "table.md").read_text()
    assert "0 differ" in table
    assert table.count("the same, bit for bit") >= 2
