"""Checkpoints: whole or absent whatever happens while one is written, and never silently damaged."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lavit_dist.checkpoint.snapshot import HostCopies, Snapshot, write_snapshot
from lavit_dist.checkpoint.store import CheckpointStore, Retention
from lavit_dist.checkpoint.writer import CheckpointWriter
from lavit_dist.errors import Fault, UserError
from lavit_dist.files import sha256

KEEP_ALL = Retention(last=1000)
FILE = "part/model.json"


def save(
    store: CheckpointStore, step: int, content: str = "weights", score: float | None = None, keep: Retention = KEEP_ALL
) -> Path:
    writer = CheckpointWriter(store, keep)
    writer.begin(step, Snapshot(objects={FILE: f"{content} {step}"}), score)
    writer.finish()
    return store.step_folder(step)


def test_what_was_saved_is_found(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert store.latest() is None
    for step in (1, 20, 300):
        save(store, step)
        newest = store.latest()
        assert newest is not None
        assert newest.step == step
        assert (newest.folder / FILE).read_text() == f'"weights {step}"'


def test_a_disk_without_room_leaves_the_step_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    writer = CheckpointWriter(store, Retention(last=1))
    writer.begin(2, Snapshot(objects={FILE: "first", f"{FILE}/beneath a file": "second"}))
    writer.wait()
    with pytest.raises(Fault, match=f"Step 2 could not be written to {tmp_path}"):
        writer.finish()
    newest = store.latest()
    assert newest is not None
    assert newest.step == 1
    assert "couldn't be written" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    save(store, 2, keep=Retention(last=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002"]


KILLED = """
import os, signal, sys
from pathlib import Path
import lavit_dist.checkpoint.snapshot as snapshot
import lavit_dist.checkpoint.store as store
import lavit_dist.checkpoint.writer as writer

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

root, where, moment = sys.argv[1:]
setattr({"snapshot": snapshot, "store": store, "writer": writer}[where], moment, kill)
saving = writer.CheckpointWriter(store.CheckpointStore(Path(root)), store.Retention())
saving.begin(2, snapshot.Snapshot(objects={"model.json": "new"}))
saving.finish()
"""


@pytest.mark.parametrize(
    ("where", "moment"),
    [("writer", "write_snapshot"), ("snapshot", "_Hashed"), ("store", "write_atomically"), ("store", "sync_folder")],
)
def test_a_kill_at_any_moment_leaves_a_checkpoint_to_resume_from(tmp_path: Path, where: str, moment: str) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), where, moment], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    newest = store.latest()
    assert newest is not None
    assert newest.step == 1
    save(store, 2)
    newest = store.latest()
    assert newest is not None
    assert newest.step == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001", "step-00000002"]


@given(st.data())
def test_any_damaged_byte_is_found_and_its_file_named(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    store = CheckpointStore(tmp_path_factory.mktemp("store"))
    file = save(store, 7) / FILE
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with pytest.raises(UserError, match="missing or damaged") as caught:
        store.latest()
    assert str(file) in str(caught.value)


def test_a_lost_file_is_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    file = save(store, 7) / FILE
    file.unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        store.latest()


def test_a_damaged_step_gives_way_to_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3, 4):
        save(store, step)
    (tmp_path / "step-00000004/part/model.json").write_text("cut")
    (tmp_path / "step-00000003/manifest.json").write_text("{")
    newest, quickly = store.latest(), store.newest([FILE])
    assert newest is not None
    assert newest == quickly
    assert newest.step == 2
    caplog.clear()
    newest = store.latest()
    assert [record.args[0] for record in caplog.records] == ["step-00000004", "step-00000003"]  # type: ignore[index]
    save(store, 3)
    newest = store.latest()
    assert newest is not None
    assert newest.step == 3


@pytest.mark.parametrize("name", ["step-00000009", "", "nonsense"])
def test_latest_that_names_nothing_gives_way_to_the_newest(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    (tmp_path / "latest").write_text(name)
    newest = store.latest()
    assert newest is not None
    assert newest.step == 1
    assert "step-00000001 is the newest step" in caplog.text
    shutil.rmtree(newest.folder)
    with pytest.raises(
        UserError, match=rf"names the checkpoint ({name}|\(no name\)), which is missing.*or remove it to start afresh"
    ):
        store.latest()


@given(
    losses=st.dictionaries(st.integers(0, 40), st.floats(0, 9), min_size=1, max_size=12),
    keep=st.builds(Retention, last=st.integers(1, 4), every=st.integers(0, 6), best=st.integers(0, 3)),
)
def test_pruning_keeps_the_newest_the_regular_and_the_best(
    tmp_path_factory: pytest.TempPathFactory, losses: dict[int, float], keep: Retention
) -> None:
    store = CheckpointStore(tmp_path_factory.mktemp("store"))
    steps = sorted(losses)
    for step in steps:
        save(store, step, score=losses[step])
    store.prune(keep)
    kept = {int(path.name.removeprefix("step-")) for path in store.root.glob("step-*")}
    assert kept == set(steps[-keep.last :]) | {step for step in steps if keep.every and step % keep.every == 0} | set(
        sorted(steps, key=lambda step: losses[step])[: keep.best]
    )
    newest = store.latest()
    assert newest is not None
    assert newest.step == steps[-1]


def test_going_back_removes_what_came_after(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3):
        save(store, step)
    earlier = store.latest(until=2)
    assert earlier is not None
    assert earlier.step == 2
    store.go_back_to(earlier)
    newest = store.latest()
    assert newest is not None
    assert newest.step == 2
    assert not store.step_folder(3).exists()
    assert store.latest(until=0) is None


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 5, "old")
    folder = save(store, 5, "new")
    assert (folder / FILE).read_text() == '"new 5"'
    assert [path.name for path in (folder / "part").iterdir()] == ["model.json"]


def test_steps_after_the_one_that_was_gone_back_to_do_not_push_out_new_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1000, 2000):
        save(store, step)
    (tmp_path / "latest").write_text("step-00001000")  # as the message about a damaged step advises
    save(store, 1500)
    store.prune(Retention(last=1))
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00001500"]
    newest = store.latest()
    assert newest is not None
    assert newest.step == 1500


def test_pruning_leaves_what_a_user_put_beside_the_steps(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        save(store, step)
    kept = [tmp_path / "step-best", tmp_path / "step-00000001-keep"]
    for copy in kept:
        shutil.copytree(store.step_folder(1), copy)
    (tmp_path / "step-00000001.tar.gz").write_text("packed")
    store.prune(Retention(last=1))
    assert not store.step_folder(1).exists()
    assert all(copy.exists() for copy in kept)
    assert (tmp_path / "step-00000001.tar.gz").exists()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"step": 1}'])
def test_a_damaged_manifest_is_named(tmp_path, content):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    (store.step_folder(1) / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        store.latest()


def test_a_manifest_that_names_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a key")
    store = CheckpointStore(tmp_path / "checkpoints")
    save(store, 1)
    path = store.step_folder(1) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = {"../../secret": {"bytes": 5, "sha256": sha256(tmp_path / "secret")}}
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"names \.\./\.\./secret, which lies outside"):
        store.latest()


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool]


@given(shapes=st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=4))
def test_what_is_written_is_what_safetensors_reads(tmp_path_factory: pytest.TempPathFactory, shapes: list) -> None:
    folder = tmp_path_factory.mktemp("snapshot")
    tensors = {f"tensor {n}": (torch.rand(shape) * 100).to(dtype) for n, (dtype, shape) in enumerate(shapes)}
    (record,) = write_snapshot(folder, HostCopies().take(Snapshot({"a/b.safetensors": tensors}))).values()
    path = folder / "a/b.safetensors"
    assert (record.bytes, record.sha256) == (path.stat().st_size, sha256(path))
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_copies_do_not_change_with_training_and_use_their_memory_again() -> None:
    copies, weight = HostCopies(), torch.ones(1000)
    first = copies.take(Snapshot({"file": {"weight": weight}})).tensors["file"]["weight"]
    weight.zero_()
    assert first.sum() == 1000
    again = copies.take(Snapshot({"file": {"weight": weight}})).tensors["file"]["weight"]
    assert again.data_ptr() == first.data_ptr()
    assert again.sum() == 0
