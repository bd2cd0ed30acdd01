"""Phases of tokenizer training: data that composes, and contradictions that are refused by name."""

import pytest
import yaml

from lavit_dist.config.base import load_config
from lavit_dist.config.tokenizer import TrainTokenizerConfig
from lavit_dist.errors import UserError

NAMES = ["run_dir=r", "tower=t", "images.shards=s", "optimizer.warmup_steps=0"]
FREE = {"steps": 5, "train": ["selector", "merger", "projection", "decoder"], "quantize": False}
ON = {"steps": 7, "train": ["merger", "codebook"], "quantize": True}


@pytest.fixture
def load(tmp_path):
    """`load(phases, *overrides)`: the configuration with these phases."""

    def load(phases: dict, *overrides: str) -> TrainTokenizerConfig:
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"phases": phases}, sort_keys=False))
        return load_config(TrainTokenizerConfig, tmp_path / "run.yaml", [*NAMES, *overrides])

    return load


def test_phases_take_place_in_their_order_and_can_be_left_out(load):
    config = load({"second": FREE, "first": ON})
    assert list(config.schedule) == ["second", "first"]
    assert config.total_steps == 12
    assert config.schedule["second"].straight_through
    without = load({"second": FREE, "first": ON}, "phases.second=null", "phases.first.steps=3")
    assert list(without.schedule) == ["first"]
    assert without.total_steps == 3


def test_the_defaults_are_a_recipe_of_the_papers_length():
    config = load_config(TrainTokenizerConfig, None, NAMES)
    assert config.total_steps == 50_000
    assert [phase.quantize for phase in config.schedule.values()] == [False, True]


def test_a_setting_of_the_decay_is_legal_where_a_phase_uses_it(load):
    falling = {**ON, "schedule": "wsd"}
    load({"free": FREE, "on": {**falling, "steps": 10}}, "optimizer.decay_shape=linear", "optimizer.schedule=constant")
    with pytest.raises(UserError, match=r"optimizer\.decay_shape linear has no meaning with the schedule constant or cosine"):
        load({"free": {**FREE, "schedule": "constant"}, "on": ON}, "optimizer.decay_shape=linear")
    with pytest.raises(
        UserError, match=r"phases\.on\.steps 7 with optimizer\.decay_share 0\.2 .* leaves the schedule wsd fewer than 2 steps"
    ):
        load({"free": FREE, "on": falling})


@pytest.mark.parametrize(
    ("phases", "overrides", "expected"),
    [
        ({"free": FREE, "on": ON}, (), {"free": False, "on": True}),
        ({"free": FREE, "on": ON, "more": ON}, (), {"free": False, "on": True, "more": False}),
        ({"on": ON}, (), {"on": True}),
        ({"on": ON}, ("initial=folder",), {"on": False}),
        ({"on": ON}, ("codebook.initialisation=random",), {"on": False}),
        ({"on": {**ON, "initialise_codebook": False}}, (), {"on": False}),
        ({"free": FREE, "on": ON, "again": {**ON, "initialise_codebook": True}}, (), {"free": False, "on": True, "again": True}),
    ],
)
def test_the_codebook_is_initialised_where_the_quantizer_comes_on(load, phases, overrides, expected):
    config = load(phases, *overrides)
    assert {name: config.initialises_codebook(name) for name in config.schedule} == expected


@pytest.mark.parametrize(
    ("phases", "overrides", "named"),
    [
        ({"on": ON, "free": FREE}, (), "phases.free.quantize"),
        ({"free": {**FREE, "train": []}}, (), "phases.free.train"),
        ({"free": {**FREE, "train": ["merger", "merger"]}}, (), "phases.free.train"),
        ({"free": {**FREE, "train": ["tower"]}}, (), "phases.free.train"),
        ({"free": {**FREE, "train": ["codebook"]}}, (), "phases.free.quantize"),
        ({"free": {**FREE, "selection": "argmax"}}, (), "phases.free.selection"),
        ({"on": {**ON, "part_learning_rate_scales": {"decoder": 0.5}}}, (), "part_learning_rate_scales"),
        ({"free": FREE}, ("phases.free=null",), "phases"),
        ({"on": {**ON, "train": ["codebook"]}}, (), "phases.on.train"),
        ({"free": FREE}, ("codebook.learning=gradient",), "zero_stage"),
        ({"free": FREE}, ("optimizer.name=muon", "zero_stage=1"), "zero_stage"),
        ({"free": FREE}, ("rate.per=range", "rate.lowest=0.5"), "rate.keep_ratio"),
        ({"free": FREE}, ("phases.free.stepps=3",), "phases.free.steps"),
    ],
)
def test_a_contradiction_is_one_sentence_that_names_the_setting(load, phases, overrides, named):
    with pytest.raises(UserError) as refusal:
        load(phases, *overrides)
    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)
