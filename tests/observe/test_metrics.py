"""What a run reports: a record per step, without doubles after a resume, and a line a person can read."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from lavit_dist.config.training import LoggingConfig
from lavit_dist.observe.metrics import METRICS_FILE, MetricsCallback, read_lines

FIGURES = {"tokens": 10.0, "seconds": 0.01, "mfu": 0.4321, "memory_gib": 12.34, "data_wait": 0.002, "padding": 0.031}


def report(folder: Path, steps: range, total_steps: int = 100, **settings: object) -> None:
    callback = MetricsCallback(folder, LoggingConfig(every_steps=2, **settings))  # type: ignore[arg-type]
    callback.on_start(steps.start - 1, total_steps)
    for step in steps:
        callback.after_step(step, FIGURES | {"loss": 1 / step})
    callback.on_end()


def steps_in(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in read_lines(folder / METRICS_FILE)]


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    report(tmp_path, range(1, 8), tensorboard=False)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 8, "lo')
    report(tmp_path, range(5, 11), tensorboard=False)
    assert steps_in(tmp_path) == list(range(1, 11))


def test_a_run_from_the_start_drops_what_a_lost_run_left(tmp_path: Path) -> None:
    report(tmp_path, range(1, 8), tensorboard=False)
    report(tmp_path, range(1, 3), tensorboard=False)
    assert steps_in(tmp_path) == [1, 2]


def test_tensorboard_gets_every_figure(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report(tmp_path, range(1, 5))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", *FIGURES}
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])


def test_a_line_has_the_step_the_figures_the_rate_and_the_time_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        report(tmp_path, range(1, 5), total_steps=4, tensorboard=False)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" | ")[0] for line in lines] == ["step 2/4", "step 4/4"]
    assert "loss 0.25" in lines[-1]
    assert "tokens/s" in lines[-1]
    for said in ("MFU 43.2%", "memory 12.3 GiB", "data wait 0.002 s", "padding 3.1%", "step 0.010 s"):
        assert f" {said} " in lines[-1]
    assert lines[-1].endswith("left 0:00")


def test_ranks_that_do_not_report_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    report(tmp_path, range(1, 3))
    assert list(tmp_path.iterdir()) == []
