"""Learning rates and optimizer groups."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lavit_dist.config.training import OptimizerConfig
from lavit_dist.engine.schedule import learning_rate_factor, parameter_groups, scheduler_factory


@given(
    schedule=st.sampled_from(["cosine", "wsd"]),
    peak=st.floats(1e-6, 1.0),
    share=st.floats(0, 1),
    warmup=st.integers(0, 50),
    total=st.integers(1, 200),
)
def test_it_rises_to_the_peak_then_falls_to_the_floor(schedule: str, peak: float, share: float, warmup: int, total: int) -> None:
    optimizer = OptimizerConfig(schedule=schedule, learning_rate=peak, min_learning_rate=peak * share, warmup_steps=warmup)
    factors = [learning_rate_factor(step, total_steps=total, optimizer=optimizer) for step in range(total + 1)]
    rising, falling = factors[:warmup], factors[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert all(0 <= factor <= 1 + 1e-12 for factor in factors)
    if total > warmup:
        assert factors[warmup] == pytest.approx(1)
        assert factors[total] == pytest.approx(share)


def test_a_constant_schedule_stays_at_the_peak() -> None:
    optimizer = OptimizerConfig(schedule="constant", warmup_steps=2)
    factors = [learning_rate_factor(step, total_steps=6, optimizer=optimizer) for step in range(6)]
    assert factors == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.5), ("1-sqrt", 1 - 0.5**0.5)])
def test_wsd_stays_at_the_peak_until_its_last_share(shape: str, middle: float) -> None:
    optimizer = OptimizerConfig(schedule="wsd", decay_share=0.4, decay_shape=shape, warmup_steps=2)
    factors = [learning_rate_factor(step, total_steps=20, optimizer=optimizer) for step in range(21)]
    assert factors[1:13] == [1.0] * 12
    assert factors[13] < 1
    assert factors[16] == pytest.approx(middle)
    assert factors[20] == 0


def test_the_scheduler_applies_the_factor_of_the_step_that_comes() -> None:
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=4)
    wrapped = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    scheduler = scheduler_factory(config, total_steps=10)(wrapped)
    for step in range(10):
        assert wrapped.param_groups[0]["lr"] == pytest.approx(0.1 * learning_rate_factor(step, total_steps=10, optimizer=config))
        wrapped.step()
        scheduler.step()


def test_groups_cover_what_is_trainable_and_decay_matrices_only() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2, bias=False))
    model[2].weight.requires_grad_(False)
    model.register_parameter("table", nn.Parameter(torch.zeros(1, 1, 5)))
    groups = parameter_groups(model.parameters(), OptimizerConfig(weight_decay=0.1))
    found = [parameter for group in groups for parameter in group["params"]]
    assert {id(parameter) for parameter in found} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(found) == len({id(parameter) for parameter in found})
    assert [id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]] == [id(model[0].weight)]


def test_groups_go_by_learning_rate_and_by_what_is_exempt_from_decay() -> None:
    first, second, third = (nn.Parameter(torch.zeros(2, 2)) for _ in range(3))
    optimizer = OptimizerConfig(learning_rate=0.1, weight_decay=0.3)
    groups = parameter_groups([first, second, third], optimizer, {second: 2.0}, without_decay=[third])
    settings = {id(parameter): (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]}
    assert settings == {id(first): (0.1, 0.3), id(second): (0.2, 0.3), id(third): (0.1, 0.0)}
