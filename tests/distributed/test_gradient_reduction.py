"""Where ZeRO-1 in bf16 shares gradients out over data-parallel ranks, they are those of one process."""

import json
from pathlib import Path

import pytest

from lavit_dist.config.base import build, save_config
from lavit_dist.config.pretrain import PretrainConfig

LAYOUTS = {"one process": (1, 1, 1), "data": (1, 1, 2), "pipeline x data": (1, 2, 2)}


@pytest.fixture(scope="module")
def trained(run_ranks, pretrain_settings, tmp_path_factory):
    """`trained(name)`: the metrics of each step on a layout."""

    def train(name):
        tensor, pipeline, data = LAYOUTS[name]
        out = tmp_path_factory.mktemp("layout")
        parallel = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline, "zero_stage": 1}
        changes = {"run_dir": str(out), "total_steps": 14, "parallel": parallel, "precision": "bf16", "micro_batch_size": 1}
        save_config(build(PretrainConfig, pretrain_settings | changes), out / "config.yaml")
        program = Path(__file__).with_name("train_on_layout.py")
        run_ranks(program, tensor * pipeline * data, str(out / "config.yaml"), str(out))
        return json.loads((out / "metrics.json").read_text())["straight"]

    return train


def test_data_parallel_ranks_get_the_gradients_of_one_process(trained):
    """Micro-batches of one row are computed alike, to the last bit, and their gradients are added up in fp32."""
    alone = trained("one process")
    assert alone[0]["grad_norm"] != alone[1]["grad_norm"]
    for name in ("data", "pipeline x data"):
        together = trained(name)
        first = {key: together[0][key] for key in ("loss", "grad_norm")}
        assert first == pytest.approx({key: alone[0][key] for key in first}, rel=1e-5), name
        assert [step["loss"] for step in together] == pytest.approx([step["loss"] for step in alone], rel=2e-2), name
