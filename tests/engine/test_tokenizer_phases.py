"""Phases cover all steps in order, and temperatures run from the first to the last."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.config.images import ImagesConfig
from lavit_dist.config.tokenizer import PhaseConfig, TrainTokenizerConfig
from lavit_dist.engine.tokenizer_phases import gumbel_temperature, phase_of, phases_of


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_every_step_belongs_to_one_phase_and_phases_follow_one_another(lengths):
    phases = {str(number): PhaseConfig(steps=steps, quantize=False, train=("merger",)) for number, steps in enumerate(lengths)}
    config = TrainTokenizerConfig(run_dir="r", tower="t", images=ImagesConfig(shards="s"), phases=phases)
    names = [phase_of(config, step).name for step in range(config.total_steps)]
    assert names == [str(number) for number, steps in enumerate(lengths) for _ in range(steps)]
    for phase in phases_of(config):
        assert phase_of(config, phase.first_step) == phase
        assert phase.first_step == 0 or phase_of(config, phase.first_step - 1) != phase


@given(st.integers(1, 50), st.floats(0.1, 5), st.floats(0.1, 5))
def test_the_temperature_goes_from_the_first_to_the_final_one_without_turning(steps, first, final):
    settings = PhaseConfig(steps=steps, quantize=False, train=("merger",), gumbel_temperature=first, final_gumbel_temperature=final)
    temperatures = [gumbel_temperature(settings, step) for step in range(steps)]
    assert temperatures[0] == pytest.approx(first)
    assert steps == 1 or temperatures[-1] == pytest.approx(final)
    assert temperatures in (sorted(temperatures), sorted(temperatures, reverse=True))
    constant = PhaseConfig(steps=steps, quantize=False, train=("merger",), gumbel_temperature=first)
    assert {gumbel_temperature(constant, step) for step in range(steps)} == {first}
