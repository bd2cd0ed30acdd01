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


@pytest.mark.parametrize("training", ["pretrain", "train_tower"])
def test_without_a_gpu_a_training_does_not_load_the_compiler(
    training: str, pretrain_settings: dict[str, Any], tower_settings: dict[str, Any], repo_root: Path, tmp_path: Path
) -> None:
    settings = {"pretrain": pretrain_settings, "train_tower": tower_settings}[training]
    few = {"total_steps": 2, "optimizer": settings["optimizer"] | {"warmup_steps": 1}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings | few))
    done = subprocess.run(
        [
            sys.executable,
            "-X",
            "importtime",
            f"launcher/{training}.py",
            "--config",
            f"{tmp_path}/config.yaml",
            f"run_dir={tmp_path}/run",
        ],
        cwd=repo_root,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        timeout=180,
        check=False,
        capture_output=True,
        text=True,
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 0, "\n".join(line for line in lines if not line.startswith("import time:"))
    loaded = {line.rpartition("|")[2].strip() for line in lines}
    assert "deepspeed" in loaded
    assert "torch._dynamo" not in loaded
