"""Which RMSNorm is built where; apex and Transformer Engine are stood in for, since neither runs without a GPU."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lavit_dist.parallel.fused_norm import rms_norm
from lavit_dist.parallel.megatron_llama import load_parameters

APEX = "import torch\nclass FusedRMSNorm(torch.nn.RMSNorm):\n    pass\n"
TRANSFORMER_ENGINE = """
import torch
class RMSNorm(torch.nn.RMSNorm):
    def get_extra_state(self): return torch.empty(0)
    def set_extra_state(self, state): pass
"""
"""With the state beside its weight that Transformer Engine's has."""


@pytest.fixture(autouse=True)
def forget_stand_ins() -> Iterator[None]:
    """Each test imports its own, or none."""
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in ("apex", "transformer_engine")]:
        del sys.modules[name]


def install(folder: Path, module: str, text: str) -> None:
    package, _, name = module.partition(".")
    (folder / package / name).mkdir(parents=True)
    (folder / package / "__init__.py").touch()
    (folder / package / name / "__init__.py").write_text(text)


@pytest.mark.parametrize(
    ("gpu", "apex", "kernels", "engine", "taken"),
    [
        (True, True, True, True, "apex.normalization"),
        (True, True, False, True, "transformer_engine.pytorch"),
        (True, False, False, True, "transformer_engine.pytorch"),
        (True, True, False, False, "lavit_dist.models.rms_norm"),
        (False, True, True, True, "lavit_dist.models.rms_norm"),
    ],
)
def test_the_fastest_that_can_run_is_taken(
    gpu: bool, apex: bool, kernels: bool, engine: bool, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if apex:
        install(tmp_path, "apex.normalization", APEX)
    if kernels:
        (tmp_path / "fused_layer_norm_cuda.py").touch()
    if engine:
        install(tmp_path, "transformer_engine.pytorch", TRANSFORMER_ENGINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    norm = rms_norm(8, 1e-5)
    assert type(norm).__module__ == taken
    load_parameters(norm, {"weight": torch.arange(8.0)})
    assert norm.get_parameter("weight").tolist() == list(range(8))
