"""The programs in benchmarks/ run; at toy size, for what they measure there says nothing."""

import subprocess
import sys

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
