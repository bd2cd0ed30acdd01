"""The tower's and the visual tokenizer's training by their entry points: resumed runs, several ranks, wrong settings."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lavit_dist.checkpoint.official import load_visual_tokenizer
from lavit_dist.config.base import to_dict
from tests.e2e.conftest import VISUAL

SHARED = {
    "seed": 1,
    "total_steps": 8,
    "global_batch_size": 8,
    "checkpoint": {"every_steps": 4},
    "logging": {"every_steps": 4, "tensorboard": False},
    "num_threads": 1,
    "precision": "fp32",
}
OPTIMIZER = {"name": "muon", "learning_rate": 1e-3, "warmup_steps": 2}


@pytest.fixture(scope="module")
def settings(tiny_world: Path) -> dict[str, Path]:
    sizes = {part: to_dict(VISUAL)[part] for part in ("encoder", "merger", "codebook", "decoder")}
    text = {"width": 32, "layers": 1, "heads": 4}
    of_stage = {
        "train_tower": {"encoder": sizes["encoder"], "text": text, "text_tokenizer": str(tiny_world / "language_model")},
        "train_tokenizer": {
            **sizes,
            "tower": str(tiny_world / "tokenizer"),
            "quantize_from": 3,
            "kmeans_batches": 2,
            "selector_signal": "reconstruction_error",
            "freeze_selector": True,
            "commitment_cost": 0.25,
        },
    }
    paths = {}
    for stage, own in of_stage.items():
        paths[stage] = tiny_world / f"{stage}.yaml"
        values = {**SHARED, "optimizer": OPTIMIZER, "pairs": str(tiny_world / "pairs/train"), **own}
        paths[stage].write_text(yaml.safe_dump(values))
    return paths


def train(
    repo_root: Path, stage: str, config: Path, run_dir: Path, *overrides: str, processes: int = 1
) -> subprocess.CompletedProcess:
    start = [sys.executable]
    if processes > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*start, f"launcher/{stage}.py", "--config", str(config), f"run_dir={run_dir}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=False, cwd=repo_root, env=environment, timeout=180, capture_output=True, text=True)


def losses(run_dir: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records]


@pytest.mark.parametrize("stage", ["train_tower", "train_tokenizer"])
def test_a_resumed_run_repeats_the_straight_one_bit_for_bit(settings, repo_root, tmp_path, stage):
    """The run is cut back to its middle checkpoint, as a crash after it would leave things, and started again."""
    first = train(repo_root, stage, settings[stage], tmp_path / "run")
    assert first.returncode == 0, first.stderr
    straight = losses(tmp_path / "run")
    assert [step for step, _ in straight] == list(range(1, 9))
    shutil.rmtree(tmp_path / "run/model")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000008")
    (tmp_path / "run/checkpoints/latest").write_text("step-00000004")
    again = train(repo_root, stage, settings[stage], tmp_path / "run")
    assert again.returncode == 0, again.stderr
    assert "resumed from" in again.stderr
    assert losses(tmp_path / "run") == straight
    assert "is already there" in train(repo_root, stage, settings[stage], tmp_path / "run").stderr


@pytest.mark.parametrize(
    "overrides",
    [("freeze_selector=false", "optimizer.name=adamw", "selector_signal=straight_through"), ("optimizer.name=muon",)],
)
def test_two_ranks_make_one_codebook_of_unit_vectors_that_differ(settings, repo_root, tmp_path, overrides):
    result = train(repo_root, "train_tokenizer", settings["train_tokenizer"], tmp_path / "two", *overrides, processes=2)
    assert result.returncode == 0, result.stderr
    assert len(losses(tmp_path / "two")) == 8
    codebook = load_visual_tokenizer(tmp_path / "two/model").quantizer.embedding.weight
    assert ((codebook.norm(dim=-1) - 1).abs() < 1e-5).all()
    assert len(codebook.unique(dim=0)) == VISUAL.codebook.size


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_frozen_selector_stays_as_it_was_when_the_quantizer_came_on(settings, repo_root, tmp_path, optimizer):
    result = train(repo_root, "train_tokenizer", settings["train_tokenizer"], tmp_path, f"optimizer.name={optimizer}")
    assert result.returncode == 0, result.stderr
    files = [tmp_path / f"checkpoints/step-0000000{step}/deepspeed/mp_rank_00_model_states.pt" for step in (4, 8)]
    then, now = (torch.load(file, weights_only=False)["module"] for file in files)  # our own file, which holds plain Python too
    frozen = [name for name in now if "token_predictor" in name]
    assert frozen
    for name in frozen:
        assert torch.equal(then[name], now[name]), name
    assert any(not torch.equal(then[name], now[name]) for name in now)


@pytest.mark.parametrize(
    ("stage", "override", "named"),
    [
        ("train_tokenizer", "quantize_from=8", "quantize_from"),
        ("train_tokenizer", "keep_ratio=1.5", "keep_ratio"),
        ("train_tokenizer", "tower=/nowhere", "/nowhere"),
        ("train_tokenizer", "merger.heads=5", "merger.heads"),
        ("train_tower", "global_batch_sise=4", "global_batch_size"),
        ("train_tower", "encoder.patch_size=7", "encoder.patch_size"),
    ],
)
def test_a_wrong_setting_is_one_sentence_and_writes_nothing(settings, repo_root, tmp_path, stage, override, named):
    result = train(repo_root, stage, settings[stage], tmp_path / "run", override)
    assert result.returncode == 2
    assert named in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
