"""Configurations: strict keys, composition by `base:`, overrides, and what is written reads back equal."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.config import build, config, load_config, save_config, to_dict
from lavit_dist.config.generate import SamplingConfig
from lavit_dist.config.model import LlamaConfig, VisualTokenizerConfig
from lavit_dist.config.training import OptimizerConfig
from lavit_dist.errors import UserError, check


@config
class InnerConfig:
    """Part of an example configuration."""

    learning_rate: float = 0.5
    """Any float."""
    betas: tuple[float, float] = (0.9, 0.95)
    """A pair."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """A choice."""

    def validate(self) -> None:
        check(self.learning_rate >= 0, f"inner.learning_rate {self.learning_rate} must not be negative.")


@config
class OuterConfig:
    """An example configuration."""

    run_dir: str
    """A setting without a default."""
    total_steps: int = 10
    """An integer."""
    name: str | None = None
    """A text or nothing."""
    names: tuple[str, ...] = ()
    """Several texts."""
    tensorboard: bool = True
    """A switch."""
    inner: InnerConfig = InnerConfig(learning_rate=0.25)
    """A part whose default differs from its class's."""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_overrides_win_over_the_file_and_the_file_over_its_bases(tmp_path: Path) -> None:
    write(tmp_path, "common/first.yaml", "run_dir: first\ntotal_steps: 1\ninner: {learning_rate: 1.0, schedule: constant}\n")
    write(tmp_path, "common/second.yaml", "total_steps: 2\nname: second\n")
    path = write(tmp_path, "run.yaml", "base: [common/first.yaml, common/second.yaml]\nname: run\ninner: {learning_rate: 2.0}\n")
    loaded = load_config(OuterConfig, path, ["inner.learning_rate=1e-3", "names=[a,b]"])
    assert loaded == OuterConfig(
        run_dir="first",
        total_steps=2,
        name="run",
        names=("a", "b"),
        inner=InnerConfig(learning_rate=1e-3, schedule="constant"),
    )


def test_a_part_given_in_part_keeps_the_defaults_of_its_owner() -> None:
    assert build(OuterConfig, {"run_dir": "r", "inner": {"schedule": "constant"}}).inner.learning_rate == 0.25


def test_a_base_that_leads_back_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "base: b.yaml\n")
    write(tmp_path, "b.yaml", "base: a.yaml\n")
    with pytest.raises(UserError, match="its own base by way of"):
        load_config(OuterConfig, tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["total_step=3"], "unknown key 'total_step'; did you mean 'total_steps'?"),
        (["inner.learning_rat=3"], "unknown key 'inner.learning_rat'; did you mean 'inner.learning_rate'?"),
        (["learning_rate=3"], "unknown key 'learning_rate'; did you mean 'inner.learning_rate'?"),
        (["inner.zzz=3"], "legal here: inner.learning_rate, inner.betas, inner.schedule."),
        (["total_steps=many"], "total_steps = 'many' is not legal"),
        (["total_steps=1.5"], "total_steps = 1.5 is not legal"),
        (["inner.schedule=linear"], "inner.schedule = 'linear' is not legal: input should be 'cosine' or 'constant'."),
        (["inner.learning_rate=nan"], "inner.learning_rate = 'nan' is not legal"),
        (["inner.learning_rate=-1"], "inner.learning_rate -1.0 must not be negative."),
        (["inner=3"], "inner = 3 is not legal"),
        (["total_steps"], "The argument 'total_steps' is not of the form key=value"),
        (["=3"], "The argument '=3' is not of the form key=value"),
        (["name=${nowhere}"], "can't be resolved"),
    ],
)
def test_a_wrong_setting_is_one_sentence_that_names_it(overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(OuterConfig, None, ["run_dir=r", *overrides])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_setting_without_default_must_be_given() -> None:
    with pytest.raises(UserError, match="'run_dir' is not set; give it in the file or as run_dir=VALUE"):
        load_config(OuterConfig, None)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "doesn't exist"), (b"- a\n- b\n", "holds a list"), (b"a: [1\n", "can't be read"), (b"\xff\xfe\xff", "can't be read")],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=sentence) as caught:
        load_config(OuterConfig, path)
    assert str(path) in str(caught.value)


def test_a_configuration_is_frozen() -> None:
    value = build(OuterConfig, {"run_dir": "r"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.total_steps = 3  # type: ignore[misc]


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20).filter(lambda text: "$" not in text)
rates = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
values = st.fixed_dictionaries(
    {"run_dir": texts},
    optional={
        "total_steps": st.integers(-(2**40), 2**40),
        "name": st.none() | texts,
        "names": st.lists(texts, max_size=3),
        "tensorboard": st.booleans(),
        "inner": st.fixed_dictionaries(
            {},
            optional={
                "learning_rate": rates,
                "betas": st.tuples(rates, rates),
                "schedule": st.sampled_from(["cosine", "constant"]),
            },
        ),
    },
)


@given(values)
def test_what_is_written_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, given_values: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    value = build(OuterConfig, given_values)
    save_config(value, path)
    assert load_config(OuterConfig, path) == value
    assert build(OuterConfig, to_dict(value)) == value


def test_optimizer_settings_are_checked_where_they_are_used() -> None:
    with pytest.raises(UserError, match=r"optimizer\.min_learning_rate 1\.0 must lie between 0 and learning_rate 0\.1"):
        build(OptimizerConfig, {"learning_rate": 0.1, "min_learning_rate": 1.0})


@pytest.mark.parametrize("base", ["", "5", "[1]", "{a: 1}"])
def test_a_base_that_is_no_name_is_refused(tmp_path: Path, base: str) -> None:
    path = write(tmp_path, "run.yaml", f"base: {base}\n")
    with pytest.raises(UserError, match=r"must be the name of a YAML file, or a list of such names"):
        load_config(OuterConfig, path)


@pytest.mark.parametrize("argument", ["inner=[1]", "[=1"])
def test_an_override_that_can_not_be_merged_is_one_sentence(tmp_path: Path, argument: str) -> None:
    path = write(tmp_path, "run.yaml", "inner: {learning_rate: 0.1}\n")
    with pytest.raises(UserError) as caught:
        load_config(OuterConfig, path, [argument])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cls", "argument"),
    [
        (VisualTokenizerConfig, "merger.heads=0"),
        (VisualTokenizerConfig, "decoder.heads=0"),
        (VisualTokenizerConfig, "encoder.head_width=0"),
        (VisualTokenizerConfig, "codebook.size=0"),
        (VisualTokenizerConfig, "codebook.decay=1"),
        (LlamaConfig, "num_attention_heads=0"),
        (LlamaConfig, "num_key_value_heads=-1"),
        (LlamaConfig, "init_std=0"),
        (SamplingConfig, "seed=-1"),
        (SamplingConfig, "seed=99999999999999999999999"),
        (OptimizerConfig, "weight_decay=-1"),
    ],
)
def test_numbers_out_of_range_are_named(cls: type, argument: str) -> None:
    with pytest.raises(UserError, match=rf"{argument.partition('=')[0]} = .* is not legal"):
        load_config(cls, None, [argument])
