"""Checkpoints: whole or absent whatever happens while one is written, and never silently damaged."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.checkpoint.store import CheckpointStore
from lavit_dist.errors import UserError


def save(store: CheckpointStore, step: int, content: str = "weights") -> Path:
    def write(folder: Path) -> None:
        (folder / "part").mkdir()
        (folder / "part" / "model.bin").write_text(f"{content} {step}")

    return store.save(step, write)


def test_what_was_saved_is_found(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert store.latest() is None
    for step in (1, 20, 300):
        save(store, step)
        newest = store.latest()
        assert newest is not None
        assert newest.step == step
        assert (newest.folder / "part" / "model.bin").read_text() == f"weights {step}"


def test_a_writer_that_fails_leaves_the_step_before(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)

    def write(folder: Path) -> None:
        (folder / "model.bin").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.save(2, write)
    newest = store.latest()
    assert newest is not None
    assert newest.step == 1
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000001"]
    save(store, 2)
    store.prune(keep_last=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002"]


KILLED = """
import os, signal, sys
from pathlib import Path
import lavit_dist.checkpoint.store as module

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def write(folder):
    (folder / "model.bin").write_text("new")

root, moment = sys.argv[1:]
if moment == "write":
    write = kill
else:
    setattr(module, moment, kill)
module.CheckpointStore(Path(root)).save(2, write)
"""


@pytest.mark.parametrize("moment", ["write", "_write_manifest", "sync_folder", "write_atomically"])
def test_a_kill_at_any_moment_leaves_a_checkpoint_to_resume_from(tmp_path: Path, moment: str) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), moment], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    newest = store.latest()
    assert newest is not None
    assert newest.step == 1
    save(store, 2)
    newest = store.latest()
    assert newest is not None
    assert newest.step == 2


@given(st.data())
def test_any_damaged_byte_is_found_and_its_file_named(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    store = CheckpointStore(tmp_path_factory.mktemp("store"))
    file = save(store, 7) / "part" / "model.bin"
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with pytest.raises(UserError, match="missing or damaged") as caught:
        store.latest()
    assert str(file) in str(caught.value)


def test_a_lost_file_is_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    file = save(store, 7) / "part" / "model.bin"
    file.unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        store.latest()


def test_a_damaged_step_gives_way_to_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3, 4):
        save(store, step)
    (tmp_path / "step-00000004/part/model.bin").write_text("cut")
    (tmp_path / "step-00000003/manifest.json").write_text("{")
    newest = store.latest()
    assert newest is not None
    assert newest.step == 2
    assert [record.args[0] for record in caplog.records] == ["step-00000004", "step-00000003"]  # type: ignore[index]
    save(store, 3)
    newest = store.latest()
    assert newest is not None
    assert newest.step == 3


def test_latest_that_names_nothing_says_what_to_do(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    (tmp_path / "latest").write_text("step-00000009")
    with pytest.raises(UserError, match=r"names the checkpoint step-00000009, which is missing.*or remove it to start afresh"):
        store.latest()


@given(steps=st.sets(st.integers(0, 10**7), min_size=1, max_size=5), keep_last=st.integers(1, 4))
def test_prune_keeps_the_newest(tmp_path_factory: pytest.TempPathFactory, steps: set[int], keep_last: int) -> None:
    store = CheckpointStore(tmp_path_factory.mktemp("store"))
    for step in sorted(steps):
        save(store, step)
    store.prune(keep_last)
    kept = sorted(int(path.name.removeprefix("step-")) for path in store.root.glob("step-*"))
    assert kept == sorted(steps)[-keep_last:]
    newest = store.latest()
    assert newest is not None
    assert newest.step == max(steps)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 5, "old")
    folder = save(store, 5, "new")
    assert (folder / "part" / "model.bin").read_text() == "new 5"
    assert [path.name for path in (folder / "part").iterdir()] == ["model.bin"]


def test_steps_after_the_one_that_was_gone_back_to_do_not_push_out_new_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1000, 2000):
        save(store, step)
    (tmp_path / "latest").write_text("step-00001000")  # as the message about a damaged step advises
    save(store, 1500)
    store.prune(keep_last=1)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00001500"]
    newest = store.latest()
    assert newest is not None
    assert newest.step == 1500


def test_latest_that_is_empty_says_what_to_do(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    (tmp_path / "latest").write_text("")
    with pytest.raises(UserError, match=r"names the checkpoint \(no name\), which is missing"):
        store.latest()


def test_pruning_leaves_what_a_user_put_beside_the_steps(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, lambda folder: (folder / "weights").write_text("w"))
    kept = [tmp_path / "step-best", tmp_path / "step-00000001-keep"]
    for copy in kept:
        shutil.copytree(store.step_folder(1), copy)
    (tmp_path / "step-00000001.tar.gz").write_text("packed")
    store.prune(keep_last=1)
    assert not store.step_folder(1).exists()
    assert all(copy.exists() for copy in kept)
    assert (tmp_path / "step-00000001.tar.gz").exists()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"step": 1}'])
def test_a_damaged_manifest_is_named(tmp_path, content):
    store = CheckpointStore(tmp_path)
    store.save(1, lambda folder: (folder / "weights").write_text("w"))
    (store.step_folder(1) / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        store.latest()
