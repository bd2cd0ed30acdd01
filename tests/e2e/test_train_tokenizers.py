"""The tower's and the visual tokenizer's training by their entry points: resumed runs, several ranks, wrong settings."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from lavit_dist.checkpoint.official import load_visual_tokenizer
from lavit_dist.config.base import to_dict
from lavit_dist.files import sha256
from tests.e2e.conftest import VISUAL

SHARED = {
    "seed": 1,
    "global_batch_size": 8,
    "checkpoint": {"every_steps": 4},
    "logging": {"every_steps": 4, "tensorboard": False},
    "num_threads": 1,
    "precision": "fp32",
}
PHASES = {
    "selection": {
        "steps": 3,
        "train": ["selector", "merger", "projection", "decoder"],
        "quantize": False,
        "selection": "random",
        "selector_signal": "reconstruction_error",
        "schedule": "constant",
    },
    "quantization": {
        "steps": 5,
        "train": ["merger", "projection", "codebook", "decoder"],
        "quantize": True,
        "calibrate_selector": True,
    },
}
OPTIMIZER = {"name": "muon", "learning_rate": 1e-3, "warmup_steps": 2}


@pytest.fixture(scope="module")
def settings(tiny_world: Path) -> dict[str, Path]:
    sizes = {part: to_dict(VISUAL)[part] for part in ("encoder", "merger", "codebook", "decoder")}
    text = {"width": 32, "layers": 1, "heads": 4}
    of_stage = {
        "train_tower": {
            "encoder": sizes["encoder"],
            "text": text,
            "text_tokenizer": str(tiny_world / "language_model"),
            "pairs": str(tiny_world / "pairs/train"),
            "total_steps": 8,
        },
        "train_tokenizer": {
            **sizes,
            "tower": str(tiny_world / "tokenizer"),
            "images": {"shards": str(tiny_world / "pairs/train")},
            "phases": PHASES,
            "kmeans_batches": 2,
            "commitment_cost": 0.25,
            "zero_stage": 0,
            "ema_decay": 0.9,
            "health": {"continuous_every_steps": 4, "sheet_every_steps": 4, "sheet_images": 2, "sheet_bank_images": 3},
        },
    }
    paths = {}
    for stage, own in of_stage.items():
        paths[stage] = tiny_world / f"{stage}.yaml"
        values = {**SHARED, "optimizer": OPTIMIZER, **own}
        paths[stage].write_text(yaml.safe_dump(values, sort_keys=False))
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


def weights_of(run_dir: Path) -> dict[str, str]:
    """A digest of each file of tensors of the product."""
    return {path.name: sha256(path) for path in (run_dir / "model/visual_tokenizer").glob("*.bin")}


def losses(run_dir: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records]


@pytest.mark.parametrize(("stage", "stopped"), [("train_tower", 4), ("train_tokenizer", 4), ("train_tokenizer", 3)])
def test_a_resumed_run_repeats_the_straight_one_bit_for_bit(settings, repo_root, tmp_path, stage, stopped):
    """The run is cut back to an earlier checkpoint, as a crash after it would leave things, and started again.

    Step 3 ends a phase: its checkpoint holds that phase's optimizer, and the next step starts another.
    """
    overrides = (f"checkpoint.every_steps={stopped}", "checkpoint.keep_last=9")
    first = train(repo_root, stage, settings[stage], tmp_path / "run", *overrides)
    assert first.returncode == 0, first.stderr
    straight, model = losses(tmp_path / "run"), weights_of(tmp_path / "run")
    assert [step for step, _ in straight] == list(range(1, 9))
    shutil.rmtree(tmp_path / "run/model")
    for later in (tmp_path / "run/checkpoints").glob("step-*"):
        if int(later.name[-8:]) > stopped:
            shutil.rmtree(later)
    (tmp_path / "run/checkpoints/latest").write_text(f"step-{stopped:08d}")
    again = train(repo_root, stage, settings[stage], tmp_path / "run", *overrides)
    assert again.returncode == 0, again.stderr
    assert "resumed from" in again.stderr
    assert losses(tmp_path / "run") == straight
    assert weights_of(tmp_path / "run") == model
    assert "is already there" in train(repo_root, stage, settings[stage], tmp_path / "run").stderr


@pytest.fixture(scope="module")
def by_ranks(settings, repo_root, tmp_path_factory) -> Callable[..., Path]:
    """`by_ranks(processes, *overrides)`: the folder of a run of 20 steps on so many ranks."""

    def run(processes: int, *overrides: str) -> Path:
        run_dir = tmp_path_factory.mktemp("ranks") / "run"
        steps = ("phases.selection.steps=8", "phases.quantization.steps=12", "health.sheet_every_steps=0")
        result = train(repo_root, "train_tokenizer", settings["train_tokenizer"], run_dir, *steps, *overrides, processes=processes)
        assert result.returncode == 0, result.stderr
        return run_dir

    return run


@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        (("optimizer.name=adamw", "phases.selection.selection=gumbel", "phases.selection.selector_signal=straight_through"), 1e-5),
        (("optimizer.name=adamw",), 1e-5),
        (("optimizer.name=muon",), 1e-2),
    ],
    ids=["straight-through, AdamW", "guided, AdamW", "guided, Muon"],
)
def test_ranks_and_micro_batches_decide_where_numbers_are_computed_never_which(by_ranks, overrides, tolerance):
    """Losses of 20 steps and the codebook: one rank, gradient accumulation, two ranks, and four, the last two under ZeRO 1 and 2.

    To 1e-5, but for Muon, which makes its updates orthogonal in bf16, so that a last digit of a gradient may become a third one.
    """
    adamw = "optimizer.name=adamw" in overrides
    alone = by_ranks(1, *overrides)
    expected, codebook = losses(alone), codebook_of(alone)
    others = [by_ranks(1, *overrides, "micro_batch_size=2"), by_ranks(2, *overrides, f"zero_stage={int(adamw)}")]
    others.append(by_ranks(4, *overrides, f"zero_stage={2 * adamw}", "micro_batch_size=1"))
    for run_dir in others:
        for (step, loss), (other_step, other) in zip(expected, losses(run_dir), strict=True):
            assert step == other_step
            assert other == pytest.approx(loss, rel=tolerance), f"step {step}"
        torch.testing.assert_close(codebook_of(run_dir), codebook, rtol=tolerance, atol=tolerance)


def codebook_of(run_dir: Path) -> torch.Tensor:
    codebook = load_visual_tokenizer(run_dir / "model").quantizer.embedding.weight
    assert ((codebook.norm(dim=-1) - 1).abs() < 1e-5).all()
    assert len(codebook.unique(dim=0)) == VISUAL.codebook.size
    return codebook


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_parts_that_a_phase_does_not_name_stay_as_they_are(settings, repo_root, tmp_path, optimizer):
    zero = f"zero_stage={2 if optimizer == 'adamw' else 0}"
    result = train(repo_root, "train_tokenizer", settings["train_tokenizer"], tmp_path, f"optimizer.name={optimizer}", zero)
    assert result.returncode == 0, result.stderr
    files = [tmp_path / f"checkpoints/step-0000000{step}/deepspeed/mp_rank_00_model_states.pt" for step in (4, 8)]
    then, now = (torch.load(file, weights_only=False)["module"] for file in files)  # our own file, which holds plain Python too
    frozen = [name for name in now if "token_predictor" in name]
    assert frozen
    for name in frozen:
        assert torch.equal(then[name], now[name]), name
    assert any(not torch.equal(then[name], now[name]) for name in now)
    assert len(list((tmp_path / "sheets").glob("*.png"))) == 2


@pytest.mark.parametrize(
    ("stage", "override", "named"),
    [
        ("train_tokenizer", "phases.quantization.steps=0", "phases.quantization.steps"),
        ("train_tokenizer", "phases.quantization.quantise=true", "phases.quantization.quantize"),
        ("train_tokenizer", "phases.selection.train=[codebook]", "codebook"),
        ("train_tokenizer", "phases.selection.selector_signal=straight_through", "phases.selection.selection"),
        ("train_tokenizer", "zero_stage=1", "zero_stage"),
        ("train_tokenizer", "micro_batch_size=3", "micro_batch_size"),
        ("train_tokenizer", "rate.keep_ratio=1.5", "rate.keep_ratio"),
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
