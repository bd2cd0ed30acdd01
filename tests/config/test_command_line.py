"""Entry points: what a user got wrong is one sentence and exit code 2; anything else is a defect and is shown whole."""

from __future__ import annotations

import time

import pytest

from lavit_dist.config import config, run_entry_point
from lavit_dist.config.command_line import split_settings
from lavit_dist.errors import UserError


@config
class SmallConfig:
    """An example configuration."""

    total_steps: int = 1
    """Steps."""


def never(_: SmallConfig) -> None:
    raise AssertionError("the run started although its settings are wrong")


def test_the_run_gets_the_configuration() -> None:
    seen: list[SmallConfig] = []
    run_entry_point(SmallConfig, seen.append, "An example.", ["total_steps=3", "--local_rank=1"])
    assert seen == [SmallConfig(total_steps=3)]


@pytest.mark.parametrize(("rank", "begins"), [("0", "error"), ("1", "error on rank 1")])
def test_a_wrong_setting_exits_with_2_and_one_line_after_rank_0_had_its_turn(
    rank: str, begins: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(SystemExit) as exit_:
        run_entry_point(SmallConfig, never, "An example.", ["total_stepz=3"])
    assert exit_.value.code == 2
    printed = capfd.readouterr().err
    assert printed == f"{begins}: the command line: unknown key 'total_stepz'; did you mean 'total_steps'?\n"
    assert len(waits) == (rank != "0")


def test_a_mistake_found_while_running_exits_with_2(capfd: pytest.CaptureFixture[str]) -> None:
    def run(_: SmallConfig) -> None:
        raise UserError("pairs is missing.")

    with pytest.raises(SystemExit) as exit_:
        run_entry_point(SmallConfig, run, "An example.", [])
    assert exit_.value.code == 2
    assert capfd.readouterr().err == "error: pairs is missing.\n"


def test_a_defect_is_not_hidden() -> None:
    def run(_: SmallConfig) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_entry_point(SmallConfig, run, "An example.", [])


def test_settings_are_told_from_files_and_prompts() -> None:
    arguments = ["a.png", "seed=3", "./seed=3", "model.size=a b", "a red circle, size = 3", "Size=3", "codes=[1,2]"]
    assert split_settings(arguments) == (
        ["seed=3", "model.size=a b", "codes=[1,2]"],
        ["a.png", "./seed=3", "a red circle, size = 3", "Size=3"],
    )
