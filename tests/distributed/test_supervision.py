"""Policies of documents and supervision in training: the layout changes no loss, and weights change no loss by modality at equal weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lavit_dist.config.base import build, save_config
from lavit_dist.config.pretrain import PretrainConfig
from pipelines.pretrain import open_batches
from tests.distributed.settings import Setting

STEPS = 13
"""One more than the steps after which the program could save."""
DOCUMENTS = {"captions": "one", "too_long": "split", "supervise": "generated"}
WEIGHTS = {"text_loss_weight": 2.0, "image_loss_weight": 0.25}
SEQ_LEN = 40
"""Shorter than some documents, longer than their images."""
TIMEOUT = 150
Steps = list[dict[str, float]]


@pytest.fixture(scope="module")
def settings(pretrain_settings: dict[str, Any]) -> dict[str, Any]:
    return pretrain_settings | {"total_steps": STEPS, "run_dir": "run", "seq_len": SEQ_LEN, "documents": DOCUMENTS | WEIGHTS}


@pytest.fixture(scope="module")
def train(run_ranks: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Steps]:
    """`train(settings, layout)`: the figures of each step."""

    def launch(settings: dict[str, Any], layout: Setting) -> Steps:
        out = tmp_path_factory.mktemp("run")
        save_config(build(PretrainConfig, settings), out / "config.yaml")
        (out / "settings.json").write_text(json.dumps([dataclasses.asdict(layout)]))
        program = Path(__file__).with_name("train_on_layouts.py")
        run_ranks(program, layout.world_size, *(str(out / name) for name in ("config.yaml", "settings.json", "")), timeout=TIMEOUT)
        steps: Steps = json.loads((out / layout.name / "metrics.json").read_text())["straight"]
        return steps

    return launch


@pytest.fixture(scope="module")
def one_process(train: Callable[..., Steps], settings: dict[str, Any]) -> Steps:
    return train(settings, Setting())


def test_losses_do_not_depend_on_the_layout(train: Callable[..., Steps], settings: dict[str, Any], one_process: Steps) -> None:
    steps = train(settings, Setting(data=2))
    for name in ("loss", "text_loss", "image_loss", "grad_norm"):
        assert [step[name] for step in steps] == pytest.approx([step[name] for step in one_process], rel=1e-5), name


def test_losses_by_modality_are_plain_means_and_the_loss_weighs_them(
    train: Callable[..., Steps], settings: dict[str, Any], one_process: Steps
) -> None:
    plain = train(settings | {"documents": DOCUMENTS}, Setting())[0]
    weighted = one_process[0]
    assert (weighted["text_loss"], weighted["image_loss"]) == pytest.approx((plain["text_loss"], plain["image_loss"]), rel=1e-6)
    batches = open_batches(build(PretrainConfig, settings))
    text, image = (sum(batches.rows.labels(row)[modality] for row in range(settings["global_batch_size"])) for modality in (0, 1))
    assert text > 0 and image > 0
    for step, (of_text, of_image) in ((plain, (1.0, 1.0)), (weighted, (2.0, 0.25))):
        mean = (text * of_text * step["text_loss"] + image * of_image * step["image_loss"]) / (text * of_text + image * of_image)
        assert step["loss"] == pytest.approx(mean, rel=1e-5)
