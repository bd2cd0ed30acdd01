"""Where ZeRO-1 in bf16 shares gradients out over data-parallel ranks, they are those of one process in bf16."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lavit_dist.config.base import build, save_config
from lavit_dist.config.pretrain import PretrainConfig
from tests.distributed.settings import Setting

ONE_PROCESS = Setting(precision="bf16")
SHARED = [Setting(data=2, precision="bf16"), Setting(pipeline=2, data=2, precision="bf16")]
STEPS = 14
Train = Callable[[Setting], list[dict[str, float]]]


@pytest.fixture(scope="module")
def train(run_ranks: Callable[..., None], pretrain_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Train:
    """`train(setting)`: the metrics of each step, with micro-batches of one row."""

    def launch(setting: Setting) -> list[dict[str, float]]:
        out = tmp_path_factory.mktemp("reduction")
        changes = {"run_dir": str(out), "total_steps": STEPS, "micro_batch_size": 1}
        save_config(build(PretrainConfig, pretrain_settings | changes), out / "config.yaml")
        (out / "settings.json").write_text(json.dumps([dataclasses.asdict(setting)]))
        program = Path(__file__).with_name("train_on_layouts.py")
        run_ranks(program, setting.world_size, *(str(out / name) for name in ("config.yaml", "settings.json")), str(out))
        return json.loads((out / setting.name / "metrics.json").read_text())["straight"]

    return launch


@pytest.fixture(scope="module")
def alone(train: Train) -> list[dict[str, float]]:
    return train(ONE_PROCESS)


@pytest.mark.parametrize("setting", SHARED, ids=lambda setting: setting.name)
def test_data_parallel_ranks_get_the_gradients_of_one_process(
    setting: Setting, train: Train, alone: list[dict[str, float]]
) -> None:
    """Micro-batches of one row are computed alike, to the last bit, and their gradients are added up in fp32."""
    assert abs(alone[0]["grad_norm"] / alone[1]["grad_norm"] - 1) > 1e-4  # another batch would be seen
    together = train(setting)
    first = {name: alone[0][name] for name in ("loss", "grad_norm")}
    assert {name: together[0][name] for name in first} == pytest.approx(first, rel=1e-5)
    assert [step["loss"] for step in together] == pytest.approx([step["loss"] for step in alone], rel=2e-2)


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_gets_no_gradient_in_a_step_keeps_none_of_the_step_before(
    world_size: int, run_ranks: Callable[..., None], tmp_path: Path
) -> None:
    run_ranks(Path(__file__).with_name("sums_on_ranks.py"), world_size, str(world_size), str(tmp_path))
    gradient = 1 + 2**-12
    for rank in range(world_size):
        weights = [0.0, 0.0]
        for step in json.loads((tmp_path / f"{rank}.json").read_text()):
            weights = [weight - gradient * on for weight, on in zip(weights, step["take_part"], strict=True)]
            assert step["norm"] == pytest.approx(gradient * math.sqrt(sum(step["sizes"])), rel=1e-6)
            assert step["weights"] == pytest.approx(weights, rel=2**-8)
