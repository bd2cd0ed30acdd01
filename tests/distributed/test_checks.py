"""Sanity mode: ranks that agree pass, and a weight, a norm, a master, a moment, a step or a rate that went astray on one is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lavit_dist.config.base import build, save_config
from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.parallel.topology import Layout

LAYOUTS = {  # tensor, pipeline, data, ZeRO stage, precision
    "pipeline x data, ZeRO-1": (1, 2, 2, 1, "bf16"),
    "tensor x data, ZeRO-2": (2, 1, 2, 2, "bf16"),
    "tensor x data, ZeRO-3": (2, 1, 2, 3, "bf16"),
    "tensor without ZeRO": (2, 1, 1, 0, "fp32"),
}
NORM = "model.layers.0.input_layernorm.weight (1.layer.input_layernorm.weight)"
MATRIX = "model.layers.0.mlp.down_proj.weight (1.layer.mlp.linear_fc2.weight)"


@pytest.mark.parametrize("name", LAYOUTS)
def test_harm_on_one_rank_is_named_on_all(
    name: str, run_ranks: Callable[..., None], pretrain_settings: dict[str, Any], tmp_path: Path
) -> None:
    tensor, pipeline, data, zero, precision = LAYOUTS[name]
    parallel = {
        "tensor_parallel_size": tensor,
        "pipeline_parallel_size": pipeline,
        "zero_stage": zero,
        "sequence_parallel": tensor > 1,
        "offload_optimizer": zero == 2,
    }
    changes = {
        "run_dir": str(tmp_path),
        "total_steps": 5,
        "parallel": parallel,
        "precision": precision,
        "checks": {"every_steps": 1},
    }
    save_config(build(PretrainConfig, pretrain_settings | changes), tmp_path / "config.yaml")
    layout = Layout(tensor, pipeline, data)
    program = Path(__file__).with_name("check_on_layout.py")
    run_ranks(program, layout.world_size, str(tmp_path / "config.yaml"), str(tmp_path))
    said = [json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in range(layout.world_size)]
    last = layout.world_size - 1
    harmed = last // pipeline
    who = "rank {} (pipe {}, data {}, tensor {})"
    harmed_place, last_place = (who.format(rank, *layout.coordinates(rank)) for rank in (harmed, last))

    for kind in ("norm", "matrix", "master", "moment", "step", "learning rate", "gradient norm", "nothing"):
        assert len({rank[kind] for rank in said}) == 1, kind  # all ranks stop with the same sentence
    first = said[harmed]
    assert first["nothing"] == ""
    assert first["norm"].startswith(f"Here, {NORM} on {harmed_place} differs from that on rank ")
    if data > 1 and zero < 3:
        assert first["matrix"].startswith(f"Here, {MATRIX} on {harmed_place} differs from that on rank ")
        assert "data-parallel ranks must hold the same" in first["matrix"]
    if zero > 0:
        assert first["master of"] in first["master"]
        assert f"on {harmed_place} doesn't round to the weight" in first["master"]
    assert first["moment of"] in first["moment"]
    assert f"on {harmed_place} isn't finite" in first["moment"]
    assert first["step"].startswith(f"Here, the optimizer's step is 3 on {last_place}, but 4 on rank 0 (pipe 0, data 0, tensor 0)")
    assert f"the learning rates on {last_place} differs" in first["learning rate"]
    assert "the gradient norm is " in first["gradient norm"] and last_place in first["gradient norm"]
    assert all(rank["skipped"] == {"not finite": True, "weights as before": True} for rank in said)
