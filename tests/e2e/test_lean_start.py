"""What the processes of a training load."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lavit_dist.config.base import to_dict
from tests.e2e.conftest import VISUAL


@pytest.fixture
def tower_settings(tiny_world: Path) -> dict[str, Any]:
    return {
        "encoder": to_dict(VISUAL)["encoder"],
        "text": {"width": 32, "layers": 1, "heads": 4},
        "text_tokenizer": str(tiny_world / "language_model"),
        "pairs": str(tiny_world / "pairs/train"),
        "optimizer": {"name": "muon"},
        "global_batch_size": 8,
        "num_threads": 1,
    }


def modules_of(repo_root: Path, program: str, config: Path, *arguments: str) -> set[str]:
    """What a program has imported at its end, without a GPU."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", f"launcher/{program}.py", "--config", str(config), *arguments],
        cwd=repo_root,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        timeout=180,
        check=False,
        capture_output=True,
        text=True,
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 0, "\n".join(line for line in lines if not line.startswith("import time:"))
    return {line.rpartition("|")[2].strip() for line in lines}


@pytest.mark.parametrize("training", ["pretrain", "train_tower"])
def test_a_training_does_not_load_the_compiler(
    training: str, pretrain_settings: dict[str, Any], tower_settings: dict[str, Any], repo_root: Path, tmp_path: Path
) -> None:
    settings = {"pretrain": pretrain_settings, "train_tower": tower_settings}[training]
    few = {"total_steps": 2, "optimizer": settings["optimizer"] | {"warmup_steps": 1}}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings | few))
    modules = modules_of(repo_root, training, config, f"run_dir={tmp_path}/run")
    assert "deepspeed" in modules
    assert "torch._dynamo" not in modules


def test_reading_a_tokenizer_does_not_load_the_compiler(tiny_world: Path, photos: Path, repo_root: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"tokenizer": str(tiny_world / "tokenizer"), "num_threads": 1}))
    picture = min((photos.parent / "images").iterdir())
    modules = modules_of(repo_root, "inspect_tokenizer", config, str(picture), f"out={tmp_path}/page")
    assert "torch" in modules
    assert "torch._dynamo" not in modules
