"""A checkpoint goes on under every other layout: the same weights, masters and averages, and the same losses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lavit_dist.checkpoint.weight_parts import WEIGHT, WeightParts
from lavit_dist.config.base import build, save_config
from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.engine.held_weights import MOMENTS
from lavit_dist.parallel.llama_shards import join_shares
from tests.distributed.settings import Setting
from tests.distributed.test_layouts import MODEL, OPTIMIZER

SAVED_STEP, STEPS = 4, 24
FIRST = Setting(tensor=2, pipeline=2)
OF_FOUR = [
    Setting(data=4, zero=2),
    Setting(tensor=2, data=2),
    Setting(pipeline=2, data=2),
    Setting(tensor=4, sequence_parallel=True),
    Setting(pipeline=4, zero=0),
    Setting(tensor=2, data=2, zero=3),
]
BACK = Setting(tensor=2, data=2, zero=1, checkpointing="full")
"""From ZeRO-3."""
HALF, HALF_ON_TWO = Setting(tensor=2, pipeline=2, precision="bf16"), Setting(data=4, zero=2, precision="bf16")
SECONDS = 600
pytestmark = [pytest.mark.xdist_group("reshape"), pytest.mark.timeout(SECONDS)]  # the first test waits for all runs


@pytest.fixture(scope="module")
def config(pretrain_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    folder = tmp_path_factory.mktemp("reshape")
    changes = {"run_dir": str(folder), "total_steps": STEPS, "model": MODEL, "optimizer": OPTIMIZER}
    return build(PretrainConfig, pretrain_settings | changes)


@pytest.fixture(scope="module")
def runs(config: PretrainConfig, run_ranks: Callable[..., None]) -> dict[str, Path]:
    """The folder of each run, by the name of its setting."""
    out = Path(config.run_dir)
    save_config(config, out / "config.yaml")

    def saved(setting: Setting) -> str:
        return str(out / setting.name / "checkpoints" / f"step-{SAVED_STEP:08d}")

    def launch(world_size: int, listed: list[tuple[Setting, str | None]]) -> None:
        file = out / f"runs-{world_size}.json"
        file.write_text(json.dumps([(dataclasses.asdict(setting), checkpoint) for setting, checkpoint in listed]))
        program = Path(__file__).with_name("train_reshaped.py")
        run_ranks(program, world_size, str(out / "config.yaml"), str(file), str(out), timeout=400)

    going_on = [(setting, saved(FIRST)) for setting in OF_FOUR]
    launch(4, [(FIRST, None), *going_on, (BACK, saved(OF_FOUR[-1])), (HALF, None), (HALF_ON_TWO, saved(HALF))])
    launch(1, [(Setting(), saved(FIRST))])
    return {setting.name: out / setting.name for setting in (FIRST, *OF_FOUR, BACK, Setting(), HALF, HALF_ON_TWO)}


def steps(folder: Path) -> list[dict[str, float]]:
    found: list[dict[str, float]] = json.loads((folder / "metrics.json").read_text())
    return found


@pytest.mark.parametrize("setting", [*OF_FOUR, BACK, Setting()], ids=lambda setting: setting.name)
def test_the_next_steps_are_those_of_the_straight_run(runs: dict[str, Path], setting: Setting) -> None:
    straight, reshaped = steps(runs[FIRST.name]), steps(runs[setting.name])
    assert len(straight) == len(reshaped) == STEPS - SAVED_STEP
    for name in ("loss", "grad_norm", "learning_rate"):
        assert [step[name] for step in reshaped] == pytest.approx([step[name] for step in straight], rel=1e-5)


@pytest.mark.parametrize(
    ("first", "setting"),
    [*((FIRST, setting) for setting in (*OF_FOUR, BACK, Setting())), (HALF, HALF_ON_TWO)],
    ids=lambda setting: setting.name,
)
def test_every_number_is_what_it_was(runs: dict[str, Path], config: PretrainConfig, first: Setting, setting: Setting) -> None:
    step = f"checkpoints/step-{SAVED_STEP:08d}/weights"
    there, here = WeightParts(runs[first.name] / step), WeightParts(runs[setting.name] / step)
    assert here.names == there.names
    for name in there.names:
        for kind in (WEIGHT, *MOMENTS):
            old, new = (join_shares(name, saved.shares(name, kind), config.model) for saved in (there, here))
            assert old.dtype == new.dtype == torch.float32
            assert torch.equal(old.flatten(), new.flatten()), (name, kind)
            assert old.abs().sum() > 0


def test_half_precision_goes_on_too(runs: dict[str, Path]) -> None:
    straight, reshaped = steps(runs[HALF.name]), steps(runs[HALF_ON_TWO.name])
    assert [step["loss"] for step in reshaped] == pytest.approx([step["loss"] for step in straight], rel=2e-2)
