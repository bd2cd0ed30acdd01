"""The training loop: a run that was killed, stopped or set back and started again is the run that was not."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.checkpoint.snapshot import Snapshot
from lavit_dist.checkpoint.store import CheckpointStore
from lavit_dist.config.training import CheckpointConfig, FaultsConfig
from lavit_dist.engine.events import EVENTS, STOP
from lavit_dist.engine.loop import Callback, run_training
from lavit_dist.errors import Fault, UserError
from lavit_dist.files import read_json

Harm = Callable[[int], Mapping[str, float]]


class Killed(Exception):
    """Stands for the end of the process."""


class Chain:
    """A trainable whose state depends on every step taken, on their order and on their data."""

    memory_advice = "Lower micro_batch_size."

    def __init__(self, harm: Harm = lambda batch: {}) -> None:
        """`harm` gives figures of a batch that take the place of what they would be; one that isn't finite leaves the state alone."""
        self.state, self.skipped, self.steps = 1, 0, 0
        self.harm = harm
        self.batches: list[int] = []

    def train_step(self, step: int) -> Mapping[str, float]:
        batch = step + self.skipped
        harmed = self.harm(batch)
        self.batches.append(batch)
        self.steps = step + 1
        if "grad_norm" not in harmed:
            self.state = (self.state * 31 + batch) % 1_000_003
        return {"loss": 1.0 + self.state / 1_000_003, "grad_norm": 1.0, **harmed}

    @property
    def batches_read(self) -> int:
        return self.steps + self.skipped

    def snapshot(self) -> Snapshot:
        return Snapshot(
            {"weights.safetensors": {"state": torch.tensor(self.state)}},
            {"state.json": {"state": self.state, "skipped": self.skipped, "steps": self.steps}},
        )

    def load(self, folder: Path) -> None:
        saved = read_json(folder / "state.json", "")
        self.state, self.skipped, self.steps = saved["state"], saved["skipped"], saved["steps"]

    def skip_batches(self, count: int) -> None:
        self.skipped += count


class Recorder(Callback):
    """Keeps what the loop tells it."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.started: tuple[int, int] | None = None
        self.ended = False

    def on_start(self, start_step: int, total_steps: int) -> None:
        self.started = (start_step, total_steps)
        self.losses = {step: loss for step, loss in self.losses.items() if step <= start_step}

    def after_step(self, step: int, metrics: Mapping[str, float]) -> None:
        assert metrics["seconds"] >= 0
        self.losses[step] = metrics["loss"]

    def on_end(self) -> None:
        self.ended = True


def train(
    run_dir: Path, total_steps: int, every_steps: int, harm: Harm = lambda batch: {}, asynchronous: bool = True, **faults: Any
) -> tuple[Chain, Recorder, bool]:
    chain, recorder = Chain(harm), Recorder()
    done = run_training(
        chain,
        run_dir=run_dir,
        total_steps=total_steps,
        checkpoint=CheckpointConfig(every_steps=every_steps, asynchronous=asynchronous),
        faults=FaultsConfig(**faults),
        config=FaultsConfig(**faults),
        callbacks=[recorder],
    )
    return chain, recorder, done


def newest(run_dir: Path) -> int:
    found = CheckpointStore(run_dir / "checkpoints").latest()
    return found.step if found else 0


def events(run_dir: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (run_dir / EVENTS).read_text().splitlines()]


@given(st.data())
def test_a_resumed_run_equals_the_straight_one(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    total_steps = data.draw(st.integers(1, 12))
    every_steps = data.draw(st.integers(1, 13))
    dies_at = data.draw(st.integers(0, total_steps - 1))
    asynchronous = data.draw(st.booleans())

    def die(batch: int) -> Mapping[str, float]:
        if batch == dies_at:
            raise Killed
        return {}

    root = tmp_path_factory.mktemp("runs")
    straight, expected, _ = train(root / "straight", total_steps, every_steps)
    with pytest.raises(Killed):
        train(root / "killed", total_steps, every_steps, die, asynchronous)
    resumed, recorder, done = train(root / "killed", total_steps, every_steps)
    assert done
    assert recorder.started is not None
    start = recorder.started[0]
    last = dies_at - dies_at % every_steps
    assert start in (range(0, last + 1, every_steps) if asynchronous else [last])  # one in the background may not be whole yet
    assert recorder.losses == {step: loss for step, loss in expected.losses.items() if step > start}
    assert resumed.state == straight.state


def test_the_last_step_is_saved_and_a_finished_run_takes_no_more(tmp_path: Path) -> None:
    first, _, _ = train(tmp_path, total_steps=7, every_steps=5)
    assert newest(tmp_path) == 7
    again, recorder, done = train(tmp_path, total_steps=7, every_steps=5)
    assert recorder.losses == {}
    assert recorder.ended
    assert done
    assert again.state == first.state


def test_a_longer_run_continues_a_shorter_one(tmp_path: Path) -> None:
    train(tmp_path / "short", total_steps=3, every_steps=5)
    longer, _, _ = train(tmp_path / "short", total_steps=9, every_steps=5)
    straight, _, _ = train(tmp_path / "straight", total_steps=9, every_steps=5)
    assert longer.state == straight.state


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGUSR1, STOP])
@pytest.mark.parametrize("at", [0, 3, 5])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_later(tmp_path: Path, how: signal.Signals | str, at: int) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]

    def ask(batch: int) -> Mapping[str, float]:
        if batch == at:
            if isinstance(how, str):
                (tmp_path / how).touch()
            else:
                os.kill(os.getpid(), how)
        return {}

    _, recorder, done = train(tmp_path, total_steps=9, every_steps=5, harm=ask)
    assert not done
    assert recorder.ended
    assert newest(tmp_path) == at + 1
    assert not (tmp_path / STOP).exists()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
    resumed, _, done = train(tmp_path, total_steps=9, every_steps=5)
    assert done
    assert resumed.batches == list(range(at + 1, 9))
    assert events(tmp_path) == ["started", "stopped", "started", "done"]


@pytest.mark.parametrize("figure", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_batch_that_makes_a_step_not_finite_is_skipped(tmp_path: Path, figure: str, value: float) -> None:
    chain, recorder, done = train(tmp_path, 9, 2, lambda batch: {"grad_norm": value, figure: value} if batch == 3 else {})
    assert done
    assert chain.batches == list(range(9))
    assert chain.skipped == 0
    assert len(recorder.losses) == 9
    assert events(tmp_path) == ["started", "bad step", "done"]


def test_steps_that_stay_not_finite_are_gone_back_from_and_left_out(tmp_path: Path) -> None:
    harm = lambda batch: {"grad_norm": float("nan")} if 5 <= batch < 8 else {}  # noqa: E731
    chain, recorder, done = train(tmp_path, 12, 2, harm, bad_steps=3)
    assert done
    assert chain.batches == [*range(8), *range(8, 16)]
    straight = Chain()
    for batch in [*range(4), *range(8, 16)]:
        straight.train_step(batch)
    assert chain.state == straight.state
    assert sorted(recorder.losses) == list(range(1, 13))
    assert events(tmp_path) == ["started", *["bad step"] * 3, "went back", "done"]


def test_two_bad_stretches_after_one_checkpoint_are_both_left_out(tmp_path: Path) -> None:
    harm = lambda batch: {"grad_norm": float("nan")} if batch in (13, 14, 18, 19) else {}  # noqa: E731
    chain, _, done = train(tmp_path, 20, 10, harm, bad_steps=2)
    assert done
    assert chain.batches == [*range(15), *range(15, 20), *range(20, 30)]
    assert chain.skipped == 10


def test_a_run_that_is_stopped_in_a_bad_stretch_can_still_go_back(tmp_path: Path) -> None:
    """Its own checkpoints don't push out the one from before the stretch."""

    def harm(batch: int) -> Mapping[str, float]:
        if batch in (5, 6, 7):
            (tmp_path / STOP).touch()
        return {"grad_norm": float("nan")} if 5 <= batch < 9 else {}

    for _ in range(4):
        _, _, done = train(tmp_path, 14, 4, harm, bad_steps=4)
    assert done
    assert events(tmp_path).count("stopped") == 3
    assert events(tmp_path).count("went back") == 1
    assert newest(tmp_path) == 14


def test_a_run_that_was_resumed_set_back_and_stopped_saves_where_it_is(tmp_path: Path) -> None:
    train(tmp_path, 10, 5)

    def harm(batch: int) -> Mapping[str, float]:
        if batch == 14:
            (tmp_path / STOP).touch()
        return {"loss": 99.0} if 10 <= batch < 12 else {}

    _, recorder, done = train(tmp_path, 20, 5, harm, bad_steps=2, spike_deviations=6, spike_window=8)
    assert not done
    assert newest(tmp_path) == max(recorder.losses) == 13  # batch 14 is that of step 13, for two were left out
    assert events(tmp_path)[-3:] == ["bad step", "went back", "stopped"]


def test_a_run_that_was_set_back_and_killed_leaves_the_same_batches_out(tmp_path: Path) -> None:
    def harm(batch: int, dies: bool) -> Mapping[str, float]:
        if batch == 11 and dies:
            raise Killed
        return {"grad_norm": float("nan")} if 5 <= batch < 8 else {}

    straight, _, _ = train(tmp_path / "straight", 12, 2, lambda batch: harm(batch, False), bad_steps=3)
    with pytest.raises(Killed):
        train(tmp_path / "killed", 12, 2, lambda batch: harm(batch, True), bad_steps=3)
    resumed, _, _ = train(tmp_path / "killed", 12, 2, lambda batch: harm(batch, False), bad_steps=3)
    assert resumed.state == straight.state
    assert resumed.skipped == straight.skipped == 4


def test_a_spike_of_the_loss_is_gone_back_from(tmp_path: Path) -> None:
    harm = lambda batch: {"loss": 50.0} if 21 <= batch < 24 else {}  # noqa: E731
    chain, recorder, _ = train(tmp_path, 30, 4, harm, bad_steps=2, spike_deviations=6, spike_window=8)
    assert chain.skipped == 3  # batches 20, 21 and 22; 23 then spikes alone
    assert max(recorder.losses.values()) == 50.0
    assert events(tmp_path).count("went back") == 1
    unwatched, _, _ = train(tmp_path / "unwatched", 30, 4, harm, bad_steps=2, spike_window=8)
    assert unwatched.skipped == 0


def test_a_run_that_goes_wrong_again_and_again_is_given_up(tmp_path: Path) -> None:
    harm = lambda batch: {"grad_norm": float("inf")} if batch >= 4 else {}  # noqa: E731
    with pytest.raises(
        UserError, match=r"after the run had gone back 2 times \(faults.roll_backs\); lower optimizer.learning_rate"
    ):
        train(tmp_path, 40, 2, harm, bad_steps=2, roll_backs=2)
    assert newest(tmp_path) == 4
    with pytest.raises(UserError, match="there is no checkpoint to go back to"):
        train(tmp_path / "at once", 40, 2, lambda batch: {"grad_norm": float("inf")}, bad_steps=2)


def test_a_full_disk_costs_a_checkpoint_but_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from lavit_dist.checkpoint import writer

    write, calls = writer.write_snapshot, []

    def full_at_first(folder: Path, snapshot: Snapshot) -> Any:
        calls.append(folder.name)
        if "step-00000004" in folder.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        return write(folder, snapshot)

    monkeypatch.setattr(writer, "write_snapshot", full_at_first)
    _, _, done = train(tmp_path, 9, 2)
    assert done
    assert [path.name for path in sorted((tmp_path / "checkpoints").glob("step-*"))] == ["step-00000008", "step-00000009"]
    assert "No space left on device" in caplog.text
    assert "training goes on" in caplog.text
    monkeypatch.setattr(writer, "write_snapshot", lambda *_: full_at_first(Path("step-00000004"), Snapshot()))
    with pytest.raises(Fault, match="Step 11 could not be written"):
        train(tmp_path, 11, 20)
    assert newest(tmp_path) == 9


@pytest.mark.parametrize(("at", "kind"), [(0, UserError), (3, Fault)])
def test_want_of_memory_is_explained(tmp_path: Path, at: int, kind: type[Exception]) -> None:
    def harm(batch: int) -> Mapping[str, float]:
        if batch == at:
            torch.empty(1 << 60, dtype=torch.uint8)
        return {}

    with pytest.raises(kind, match=rf"Memory ran out in step {at + 1} \(.*\)\. Lower micro_batch_size\."):
        train(tmp_path, 9, 2, harm)


def test_the_same_defect_is_not_taken_for_a_fault(tmp_path: Path) -> None:
    def harm(batch: int) -> Mapping[str, float]:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        train(tmp_path, 9, 2, harm)
