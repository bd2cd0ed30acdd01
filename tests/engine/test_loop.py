"""The training loop: a run that was killed and started again is the run that was not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.checkpoint.store import CheckpointStore
from lavit_dist.config.training import CheckpointConfig
from lavit_dist.engine import loop
from lavit_dist.engine.loop import Callback, run_training
from lavit_dist.errors import UserError


class Killed(Exception):
    """Stands for the end of the process."""


class Chain:
    """A trainable whose state depends on every step taken and on their order."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.state = 1
        self.dies_at = dies_at

    def train_step(self, step: int) -> Mapping[str, float]:
        if step == self.dies_at:
            raise Killed
        self.state = (self.state * 31 + step) % 1_000_003
        return {"loss": float(self.state)}

    def save(self, folder: Path) -> None:
        (folder / "state.json").write_text(json.dumps(self.state))

    def load(self, folder: Path) -> None:
        self.state = json.loads((folder / "state.json").read_text())


class Recorder(Callback):
    """Keeps what the loop tells it."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.started: tuple[int, int] | None = None
        self.ended = False

    def on_start(self, start_step: int, total_steps: int) -> None:
        self.started = (start_step, total_steps)

    def after_step(self, step: int, metrics: Mapping[str, float]) -> None:
        assert metrics["seconds"] >= 0
        self.losses[step] = metrics["loss"]

    def on_end(self) -> None:
        self.ended = True


def train(root: Path, total_steps: int, every_steps: int, dies_at: int | None = None) -> tuple[Chain, Recorder]:
    chain, recorder = Chain(dies_at), Recorder()
    run_training(
        chain,
        total_steps=total_steps,
        store=CheckpointStore(root),
        checkpoint=CheckpointConfig(every_steps=every_steps),
        callbacks=[recorder],
    )
    return chain, recorder


@given(st.data())
def test_a_resumed_run_equals_the_straight_one(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    total_steps = data.draw(st.integers(1, 12))
    every_steps = data.draw(st.integers(1, 13))
    dies_at = data.draw(st.integers(0, total_steps - 1))
    root = tmp_path_factory.mktemp("checkpoints")
    straight, expected = train(root / "straight", total_steps, every_steps)
    with pytest.raises(Killed):
        train(root / "killed", total_steps, every_steps, dies_at)
    resumed, recorder = train(root / "killed", total_steps, every_steps)
    start = dies_at - dies_at % every_steps
    assert recorder.started == (start, total_steps)
    assert recorder.losses == {step: loss for step, loss in expected.losses.items() if step > start}
    assert resumed.state == straight.state


def test_the_last_step_is_saved_and_a_finished_run_takes_no_more(tmp_path: Path) -> None:
    first, _ = train(tmp_path, total_steps=7, every_steps=5)
    newest = CheckpointStore(tmp_path).latest()
    assert newest is not None
    assert newest.step == 7
    again, recorder = train(tmp_path, total_steps=7, every_steps=5)
    assert recorder.losses == {}
    assert recorder.ended
    assert again.state == first.state


def test_a_longer_run_continues_a_shorter_one(tmp_path: Path) -> None:
    train(tmp_path / "short", total_steps=3, every_steps=5)
    longer, _ = train(tmp_path / "short", total_steps=9, every_steps=5)
    straight, _ = train(tmp_path / "straight", total_steps=9, every_steps=5)
    assert longer.state == straight.state


def test_a_checkpoint_of_another_number_of_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    run_training(Chain(), total_steps=2, store=store, checkpoint=CheckpointConfig())
    monkeypatch.setattr(loop, "world_size", lambda: 4)
    with pytest.raises(UserError, match="was written by 1 processes, but 4 were started; start 1"):
        run_training(Chain(), total_steps=4, store=store, checkpoint=CheckpointConfig())


@pytest.mark.parametrize("figure", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_training_stops_before_it_saves_what_is_not_finite(tmp_path: Path, figure: str, value: float) -> None:
    class Diverging(Chain):
        def train_step(self, step: int) -> Mapping[str, float]:
            metrics = dict(super().train_step(step))
            return metrics | {figure: value} if step == 3 else metrics

    store = CheckpointStore(tmp_path)
    with pytest.raises(UserError, match=f"The {figure} of step 4 is"):
        run_training(Diverging(), total_steps=9, store=store, checkpoint=CheckpointConfig(every_steps=2))
    newest = store.latest()
    assert newest is not None
    assert newest.step == 2
