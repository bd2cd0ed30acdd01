"""Which AdamW runs where, and that the one which needs no compiler is AdamW; apex is stood in for, since it needs a GPU."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lavit_dist.config.base import build
from lavit_dist.config.training import OptimizerConfig
from lavit_dist.engine.adamw import adamw_implementation, apex_adamw, begin_adam, deepspeed_optimizer
from lavit_dist.engine.held_weights import optimizer_steps
from lavit_dist.errors import UserError

STAND_IN = """
import torch
class FusedAdam(torch.optim.AdamW):
    def __init__(self, params, adam_w_mode=False, **settings):
        assert adam_w_mode
        super().__init__(params, **settings)
"""


@pytest.fixture
def apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An apex with its kernels, as far as can be told without a GPU."""
    (tmp_path / "apex" / "optimizers").mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").touch()
    (tmp_path / "apex" / "optimizers" / "__init__.py").write_text(STAND_IN)
    (tmp_path / "amp_C.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


@pytest.mark.parametrize("gpu", [True, False])
def test_without_apex_torchs_runs_everywhere(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    optimizer = OptimizerConfig()
    assert adamw_implementation(optimizer) == "torch"
    assert apex_adamw(optimizer) is None
    settings = deepspeed_optimizer(optimizer)["params"]
    assert settings["torch_adam"] and settings["fused"]


@pytest.mark.usefixtures("apex")
def test_apexs_runs_on_gpus_unless_state_is_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert adamw_implementation(OptimizerConfig()) == "torch"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert adamw_implementation(OptimizerConfig()) == "apex"
    assert adamw_implementation(OptimizerConfig(), offloaded=True) == "torch"
    assert adamw_implementation(OptimizerConfig(), zero_stage=2) == "apex"
    assert adamw_implementation(OptimizerConfig(), zero_stage=3) == "torch"
    assert adamw_implementation(OptimizerConfig(implementation="torch")) == "torch"
    make = apex_adamw(OptimizerConfig(betas=(0.8, 0.9), learning_rate=0.5))
    assert make is not None
    made = make([{"params": [torch.nn.Parameter(torch.zeros(2))], "weight_decay": 0.0}])
    assert type(made).__module__ == "apex.optimizers"
    assert (made.param_groups[0]["betas"], made.param_groups[0]["lr"], made.param_groups[0]["weight_decay"]) == (
        (0.8, 0.9),
        0.5,
        0.0,
    )


class OfGroups(torch.optim.Optimizer):
    """Counts as apex's FusedAdam does, in the group, or as DeepSpeed's, in the state of a group's last weight."""

    def __init__(self, in_group: bool) -> None:
        super().__init__([torch.nn.Parameter(torch.zeros(size)) for size in (2, 3)], {"lr": 0.1})
        self.in_group = in_group

    def step(self, closure: None = None) -> None:  # type: ignore[override] # no closures here
        for group in self.param_groups:
            for weight in group["params"]:
                begin_adam(self.state[weight], weight)
            counts = group if self.in_group else self.state[group["params"][-1]]
            counts["step"] = counts.get("step", 0) + 1


OfGroups.__name__ = "FusedAdam"


@pytest.mark.parametrize("in_group", [True, False])
def test_a_count_of_updates_that_a_group_shares_survives_several_resumes(in_group: bool) -> None:
    optimizer = OfGroups(in_group)
    engine = SimpleNamespace(basic_optimizer=optimizer)
    for updates in (3, 5, 9):
        while max(optimizer_steps(engine), default=0) < updates:
            optimizer.step()
        assert optimizer_steps(engine) == {updates}
        for state in optimizer.state.values():  # as a resume sets it
            state["step"].fill_(updates)
        for group in optimizer.param_groups:
            group["step"] = updates
        assert optimizer_steps(engine) == {updates}


def test_deepspeeds_own_is_an_explicit_choice() -> None:
    optimizer = OptimizerConfig(implementation="deepspeed")
    assert apex_adamw(optimizer) is None
    assert "torch_adam" not in deepspeed_optimizer(optimizer)["params"]


def test_apexs_where_it_cant_run_is_refused() -> None:
    with pytest.raises(UserError, match=r"optimizer\.implementation apex needs a GPU"):
        adamw_implementation(OptimizerConfig(implementation="apex"))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "adamw8bit"}, "'adamw' or 'muon'"),
        ({"name": "muon", "implementation": "apex"}, "optimizer.implementation apex is of AdamW alone"),
    ],
)
def test_what_no_library_here_can_shard_is_refused(settings: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError) as refusal:
        build(OptimizerConfig, settings)
    assert sentence in str(refusal.value)
