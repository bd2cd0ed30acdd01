"""The tower's and the visual tokenizer's training by their entry points: resumed runs, several ranks, wrong settings."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from lavit_dist.checkpoint.official import load_visual_tokenizer
from lavit_dist.checkpoint.weight_parts import WeightParts
from lavit_dist.config.base import to_dict
from lavit_dist.files import sha256
from lavit_dist.observe.metrics import read_lines
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
STRAIGHT_THROUGH = (
    "optimizer.name=adamw",
    "phases.selection.selection=gumbel",
    "phases.selection.selector_signal=straight_through",
    "phases.selection.final_gumbel_temperature=0.5",
    "phases.selection.part_learning_rate_scales={selector: 0.5}",
    "phases.quantization.learning_rate_scale=0.5",
    "phases.quantization.warmup_steps=1",
    "rate.per=range",
)
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


def command_of(stage: str, config: Path, run_dir: Path, *overrides: str, processes: int = 1) -> tuple[list[str], dict[str, str]]:
    """The command that trains on so many ranks, and its environment."""
    start = [sys.executable]
    if processes > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*start, f"launcher/{stage}.py", "--config", str(config), f"run_dir={run_dir}", *overrides]
    return command, {**os.environ, "OMP_NUM_THREADS": "1"}


def train(
    repo_root: Path, stage: str, config: Path, run_dir: Path, *overrides: str, processes: int = 1
) -> subprocess.CompletedProcess:
    command, environment = command_of(stage, config, run_dir, *overrides, processes=processes)
    return subprocess.run(command, check=False, cwd=repo_root, env=environment, timeout=180, capture_output=True, text=True)


def test_a_killed_run_on_two_ranks_goes_on_bit_for_bit(settings, repo_root, tmp_path):
    """All that a resumed run must find again at once: streams, micro-batches, ZeRO-2, bf16, straight-through, averaged weights."""
    overrides = (
        *STRAIGHT_THROUGH,
        *("images.order=streamed", "images.streams=4", "micro_batch_size=2", "zero_stage=2", "precision=bf16"),
        *("checkpoint.every_steps=2", "checkpoint.keep_last=9", "feature_disk_bytes=100000", "health.sheet_every_steps=5"),
        *("phases.selection.calibrate_selector=true", "phases.quantization.steps=12"),
    )
    config = settings["train_tokenizer"]
    straight = train(repo_root, "train_tokenizer", config, tmp_path / "straight", *overrides, processes=2)
    assert straight.returncode == 0, straight.stderr
    command, environment = command_of("train_tokenizer", config, tmp_path / "killed", *overrides, processes=2)
    process = subprocess.Popen(command, cwd=repo_root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_step(tmp_path / "killed", 7, process)
    for one in (*psutil.Process(process.pid).children(recursive=True), process):
        one.kill()
    process.wait()
    assert not (tmp_path / "killed/model").exists()
    again = train(repo_root, "train_tokenizer", config, tmp_path / "killed", *overrides, processes=2)
    assert again.returncode == 0, again.stderr
    assert "resumed from" in again.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    assert weights_of(tmp_path / "killed") == weights_of(tmp_path / "straight")
    manifests = [
        (run / "checkpoints/step-00000015/manifest.json").read_text() for run in (tmp_path / "straight", tmp_path / "killed")
    ]
    assert manifests[0] == manifests[1]  # every number of weights, optimizer, codebook and averages, and the place in the data
    assert sorted(path.name for path in (tmp_path / "killed/quarantine").iterdir()) == ["rank-00000.jsonl", "rank-00001.jsonl"]


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_a_calibrated_selector_that_goes_on_learning_stays_calibrated(settings, repo_root, tmp_path, zero_stage):
    overrides = (
        *STRAIGHT_THROUGH[:3],
        *("phases.quantization=null", "phases.selection.calibrate_selector=true", "phases.selection.steps=3"),
        *("optimizer.learning_rate=1e-6", "rate.keep_ratio=0.15", f"zero_stage={zero_stage}", "health.sheet_every_steps=0"),
        *("kmeans_batches=6", "global_batch_size=16"),
    )
    result = train(repo_root, "train_tokenizer", settings["train_tokenizer"], tmp_path, *overrides)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(abs(record["keep_ratio"] - 0.15) < 0.08 for record in records)


def test_the_recipe_at_full_size_runs_with_other_sizes_and_goes_on_from_another_tokenizer(
    settings, repo_root, tiny_world, tmp_path
):
    """configs/lavit-7b/tokenizer.yaml with nothing changed but sizes, steps and paths; then more steps of the quantizer from its product."""
    small = yaml.safe_load(settings["train_tokenizer"].read_text())
    own = {key: small[key] for key in ("encoder", "merger", "decoder", "tower")}
    changes = {
        "base": str(repo_root / "configs/lavit-7b/tokenizer.yaml"),
        **own,
        "images": {"shards": str(tiny_world / "pairs/train"), "streams": 4},
        "codebook": {"size": 24, "dim": 8},
        "phases": {"selection": {"steps": 2}, "quantization": {"steps": 2}},
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "kmeans_batches": 2,
        "num_threads": 1,
        "optimizer": {"warmup_steps": 1},
        "logging": {"tensorboard": False},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(changes, sort_keys=False))
    first = train(repo_root, "train_tokenizer", path, tmp_path / "first")
    assert first.returncode == 0, first.stderr
    before = codebook_of(tmp_path / "first")
    overrides = (
        f"initial={tmp_path / 'first/model'}",
        "phases.selection=null",
        "optimizer.learning_rate=1e-6",
        "codebook.decay=0.999",
    )
    second = train(repo_root, "train_tokenizer", path, tmp_path / "second", *overrides)
    assert second.returncode == 0, second.stderr
    assert "k-means" not in second.stderr
    assert ((codebook_of(tmp_path / "second") - before).norm(dim=-1) < 0.05).all()
    other = train(repo_root, "train_tokenizer", path, tmp_path / "third", *overrides, "codebook.size=32")
    assert other.returncode == 2
    assert "quantize.embedding.weight" in other.stderr


def test_codes_that_learn_by_gradient_end_at_unit_length(settings, repo_root, tmp_path):
    overrides = ("codebook.learning=gradient", "codebook.initialisation=random", "optimizer.name=adamw", "ema_decay=0.5")
    result = train(repo_root, "train_tokenizer", settings["train_tokenizer"], tmp_path, *overrides)
    assert result.returncode == 0, result.stderr
    codebook_of(tmp_path)


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    """Returns when the run has reported step `step`."""
    deadline = time.monotonic() + 120
    while not ((run_dir / "metrics.jsonl").exists() and len(losses(run_dir)) >= step):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def weights_of(run_dir: Path) -> dict[str, str]:
    """A digest of each file of tensors of the product."""
    return {path.name: sha256(path) for path in (run_dir / "model/visual_tokenizer").glob("*.bin")}


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in map(json.loads, read_lines(run_dir / "metrics.jsonl"))]


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
    ("overrides", "processes", "tolerance"),
    [
        (STRAIGHT_THROUGH, (4,), 1e-5),
        (("optimizer.name=adamw",), (1, 2, 4), 1e-5),
        (("optimizer.name=muon",), (4,), 1e-2),
    ],
    ids=["straight-through, AdamW", "guided, AdamW", "guided, Muon"],
)
def test_ranks_and_micro_batches_decide_where_numbers_are_computed_never_which(by_ranks, overrides, processes, tolerance):
    """Losses of 20 steps and the codebook: one rank beside gradient accumulation, two ranks under ZeRO 1, and four under ZeRO 2.

    To 1e-5, but for Muon, which makes its updates orthogonal in bf16, so that a last digit of a gradient may become a third one.
    """
    adamw = "optimizer.name=adamw" in overrides
    alone = by_ranks(1, *overrides)
    expected, codebook = losses(alone), codebook_of(alone)
    settings_of = {
        1: ("micro_batch_size=2",),
        2: (f"zero_stage={int(adamw)}",),
        4: (f"zero_stage={2 * adamw}", "micro_batch_size=1"),
    }
    for run_dir in [by_ranks(size, *overrides, *settings_of[size]) for size in processes]:
        for (step, loss), (other_step, other) in zip(expected, losses(run_dir), strict=True):
            assert step == other_step
            assert other == pytest.approx(loss, rel=tolerance), f"step {step}"
        torch.testing.assert_close(codebook_of(run_dir), codebook, rtol=tolerance, atol=tolerance)


def codebook_of(run_dir: Path) -> torch.Tensor:
    codebook = load_visual_tokenizer(run_dir / "model").quantizer.embedding.weight
    assert ((codebook.norm(dim=-1) - 1).abs() < 1e-5).all()
    assert len(codebook.unique(dim=0)) == VISUAL.codebook.size
    return codebook


@pytest.mark.parametrize(("optimizer", "tolerance"), [("adamw", 1e-5), ("muon", 1e-2)])
def test_a_run_goes_on_with_other_ranks_zero_stages_and_micro_batches(settings, repo_root, tmp_path, optimizer, tolerance):
    """From two ranks to one to four, in the middle of either phase; streams move from rank to rank."""
    adamw = optimizer == "adamw"
    steps = ("phases.selection.steps=6", "phases.quantization.steps=8", "health.sheet_every_steps=0", "checkpoint.keep_last=9")
    own = (f"optimizer.name={optimizer}", "images.order=streamed", "images.streams=4")
    legs = [(2, 4, f"zero_stage={2 * adamw}"), (1, 8, "micro_batch_size=2"), (4, 14, f"zero_stage={int(adamw)}")]
    config, straight, run_dir = settings["train_tokenizer"], tmp_path / "straight", tmp_path / "reshaped"
    assert train(repo_root, "train_tokenizer", config, straight, *steps, *own).returncode == 0
    for processes, until, setting in legs:
        leg = train(repo_root, "train_tokenizer", config, run_dir, *steps, *own, setting, processes=processes)
        assert leg.returncode == 0, leg.stderr
        if until < 14:
            shutil.rmtree(run_dir / "model")
            for step in (run_dir / "checkpoints").glob("step-*"):
                if int(step.name[-8:]) > until:
                    shutil.rmtree(step)
    assert [step for step, _ in losses(run_dir)] == list(range(1, 15))
    assert [loss for _, loss in losses(run_dir)] == pytest.approx([loss for _, loss in losses(straight)], rel=tolerance)
    torch.testing.assert_close(codebook_of(run_dir), codebook_of(straight), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_parts_that_a_phase_does_not_name_stay_as_they_are(settings, repo_root, tmp_path, optimizer):
    zero = f"zero_stage={2 if optimizer == 'adamw' else 0}"
    result = train(repo_root, "train_tokenizer", settings["train_tokenizer"], tmp_path, f"optimizer.name={optimizer}", zero)
    assert result.returncode == 0, result.stderr
    then, now = (WeightParts(tmp_path / f"checkpoints/step-0000000{step}/weights") for step in (4, 8))
    frozen = [name for name in now.names if "token_predictor" in name]
    assert frozen
    for name in frozen:
        assert torch.equal(*(parts.shares(name)[0] for parts in (then, now))), name
    assert any(not torch.equal(*(parts.shares(name)[0] for parts in (then, now))) for name in now.names)
    assert len(list((tmp_path / "sheets").glob("*.png"))) == 2


@pytest.mark.parametrize(
    ("stage", "override", "named"),
    [
        ("train_tokenizer", "phases.quantization.steps=0", "phases.quantization.steps"),
        ("train_tokenizer", "phases.quantization.quantise=true", "phases.quantization.quantize"),
        ("train_tokenizer", "phases.selection.train=[codebook]", "codebook"),
        ("train_tokenizer", "phases.selection.selector_signal=straight_through", "phases.selection.selection"),
        ("train_tokenizer", "zero_stage=1", "zero_stage"),
        ("train_tokenizer", "optimizer.warmup_steps=5", "phases.selection.warmup_steps"),
        ("train_tokenizer", "optimizer.betas=[1.5,2]", "optimizer.betas"),
        ("train_tokenizer", "feature_folder=/tmp/features", "feature_disk_bytes"),
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
