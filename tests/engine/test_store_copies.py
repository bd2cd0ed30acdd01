"""Checkpoints that are copied to a store, which fails now and then, and fetched back for the run to go on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import s3fs

from lavit_dist.checkpoint.store import CheckpointStore
from lavit_dist.checkpoint.store_copies import StoreCopies
from lavit_dist.config.training import CheckpointConfig, FaultsConfig
from lavit_dist.engine.loop import run_training
from lavit_dist.errors import UserError
from tests.e2e.s3_store import unreliable_store
from tests.engine.test_loop import Chain

ROOT = Path(__file__).parents[2]


def train(run_dir: Path, total_steps: int, url: str | None, options: Mapping[str, Any], **harm: Any) -> Chain:
    chain = Chain(**harm)
    run_training(
        chain,
        run_dir=run_dir,
        total_steps=total_steps,
        checkpoint=CheckpointConfig(every_steps=2, keep_every=4, copy_to=url, storage_options=dict(options)),
        faults=FaultsConfig(bad_steps=2),
        config=CheckpointConfig(storage_options=dict(options)),
    )
    return chain


def call(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launcher/checkpoint.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_a_run_goes_on_elsewhere_from_what_a_store_has(tmp_path: Path) -> None:
    straight = train(tmp_path / "straight", 13, None, {})
    with unreliable_store() as (application, options):
        bucket = s3fs.S3FileSystem(**options)
        bucket.mkdir("runs")
        application.on = True
        train(tmp_path / "here", 7, "s3://runs/one", options)
        assert application.failures > 3
        steps = [step.step for step in StoreCopies("s3://runs/one", options).steps()]
        assert steps[-1] == 7  # those before may have been left out, while another was being copied
        given = ("s3://runs/one", "--storage-options", json.dumps(options), "--run-dir")
        fetched = call("fetch", *given, tmp_path / "there")
        assert fetched.returncode == 0, fetched.stderr
        assert "fetched step 7 into" in fetched.stdout
        about = (tmp_path / "there/checkpoints/step-00000007/about.json").read_text()
        assert json.loads(about)["versions"]["torch"]
        assert options["endpoint_url"] in about
        assert options["secret"] not in about
        again = call("fetch", *given, tmp_path / "there")
        assert (again.returncode, "has checkpoints already" in again.stderr) == (2, True)
        resumed = train(tmp_path / "there", 13, None, {})
        assert resumed.state == straight.state
        assert resumed.batches == list(range(7, 13))

        application.on = False
        (name,) = (path for path in bucket.find("runs/one/step-00000007") if path.endswith("weights.safetensors"))
        bucket.pipe_file(name, bytes(bucket.info(name)["size"]))
        harmed = call("fetch", *given, tmp_path / "harmed")
        assert harmed.returncode == 2
        assert "weights.safetensors is missing or damaged" in harmed.stderr
        assert not list((tmp_path / "harmed/checkpoints").glob("step-*"))
        strange = {"step": 7, "ranks": 1, "score": None, "files": {"../../../out": {"bytes": 1, "sha256": "0" * 64}}}
        bucket.pipe_file("runs/one/step-00000007/manifest.json", json.dumps(strange).encode())
        stranger = call("fetch", *given, tmp_path / "stranger")
        assert stranger.returncode == 2
        assert "it isn't trusted" in stranger.stderr


def test_the_store_forgets_what_was_gone_back_from_and_what_is_not_kept(tmp_path: Path) -> None:
    url = (tmp_path / "store").as_uri()
    train(tmp_path / "run", 9, url, {})
    copies = StoreCopies(url, {})
    assert [step.step for step in copies.steps()][-1] == 9
    store = CheckpointStore(tmp_path / "run/checkpoints")
    earlier = store.latest(until=8)
    assert earlier is not None
    copies.begin(earlier)
    while copies.busy:
        pass
    assert [step.step for step in copies.steps()][-1] == 8
    assert {step.step for step in copies.steps()} <= {4, 6, 8}


def test_a_store_that_cannot_be_reached_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match="The store nowhere://bucket can't be reached"):
        train(tmp_path / "run", 3, "nowhere://bucket", {})
    (tmp_path / "file").write_text("not a folder")
    chain = train(tmp_path / "other", 3, (tmp_path / "file").as_uri(), {})
    assert chain.batches == [0, 1, 2]
    assert "couldn't be copied to file://" in caplog.text
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        StoreCopies((tmp_path / "empty").as_uri(), {}).fetch_newest(CheckpointStore(tmp_path / "new"))
