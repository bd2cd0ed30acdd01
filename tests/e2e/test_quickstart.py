"""The chain of stages: what is wrong is said before anything runs, what is done is passed over, what fails is named.

That every stage works at the end of the one before is shown by .ci/run, which runs the whole chain with few steps.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from lavit_dist.config import load_config, to_dict
from lavit_dist.config.quickstart import QuickstartConfig
from lavit_dist.errors import UserError
from pipelines.quickstart_stages import plan_stages

ROOT = Path(__file__).parents[2]
PRESET = "configs/quickstart/ci.yaml"
SMALL = [
    "overrides.shapes=[train_samples=12,heldout_samples=4,samples_per_shard=12]",
    "overrides.tower=[text_tokenizer=nowhere]",
]


def quickstart(run_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launcher/quickstart.py", "--config", PRESET, f"run_dir={run_dir}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("preset", [PRESET, "configs/quickstart/quickstart.yaml"])
@pytest.mark.parametrize(
    ("data", "first", "folder"), [("null", "shapes", "quickstart"), ("photos/captions.jsonl", "ingest", "quickstart-captions")]
)
def test_every_stage_is_made_from_those_before_it(preset: str, data: str, first: str, folder: str) -> None:
    stages = plan_stages(load_config(QuickstartConfig, ROOT / preset, [f"data={data}", f"presets={ROOT}/configs/quickstart"]))
    assert [stage.name for stage in stages][:2] == [first, "text_tokenizer"]
    assert all(Path("runs", folder) in product.parents for stage in stages for product in stage.products)
    made: set[str] = set()
    for stage in stages:
        paths = {value for value in to_dict(stage.config).values() if isinstance(value, str) and value.startswith("runs/")}
        assert all(any(Path(folder) in [Path(path), *Path(path).parents] for folder in made) for path in paths - {stage.folder})
        made.add(stage.folder)
        assert (ROOT / stage.program[-1]).exists()


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("overrides.tower=[total_step=3]", "configs/quickstart/tower.yaml: unknown key 'total_step'; did you mean 'total_steps'?"),
        ("overrides.towr=[total_steps=3]", "unknown key 'overrides.towr'; did you mean 'overrides.tower'?"),
        ("overrides.tokenizer=[zero_stage=1]", "set zero_stage=0, or optimizer.name=adamw"),
        ("pretrain_processes=3", "The 3 processes that were started can't be shared out"),
        ("decoder_processes=5", "can't be shared out to decoder_processes 5"),
        ("presets=nowhere", "presets nowhere is not a folder"),
    ],
)
def test_a_wrong_setting_of_any_stage_is_said_before_anything_runs(tmp_path: Path, argument: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        plan_stages(load_config(QuickstartConfig, PRESET, [f"run_dir={tmp_path / 'run'}", argument]))
    assert sentence in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_two_do_not_work_in_one_folder(tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"):
        finished = quickstart(tmp_path, *SMALL)
    assert finished.returncode == 2
    assert finished.stderr.count("\n") == 1
    assert f"Another run is at work in {tmp_path}" in finished.stderr
    assert not (tmp_path / "pairs").exists()


def test_a_terminated_quickstart_ends_the_stage_that_runs(tmp_path: Path) -> None:
    command = [sys.executable, "launcher/quickstart.py", "--config", PRESET, f"run_dir={tmp_path}", SMALL[0]]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        while "[3/9] vision tower" not in process.stdout.readline():
            assert process.poll() is None
        while not (stage := psutil.Process(process.pid).children(recursive=True)):
            assert process.poll() is None
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    _, alive = psutil.wait_procs(stage, timeout=10)
    assert not alive


def test_a_stage_that_fails_is_named_and_those_before_it_are_kept(tmp_path: Path) -> None:
    finished = quickstart(tmp_path, *SMALL)
    assert finished.returncode == 2
    assert "The stage vision tower failed with exit code 2." in finished.stdout
    log = (tmp_path / "logs" / "tower.log").read_text()
    assert "nowhere" in log
    assert "python launcher/train_tower.py --config configs/quickstart/tower.yaml" in finished.stdout
    assert str(tmp_path / "logs" / "tower.log") in finished.stdout

    again = quickstart(tmp_path, *SMALL)
    assert again.returncode == 2
    assert again.stdout.count("already there: ") == 2

    refused = quickstart(tmp_path, SMALL[0].replace("12", "13", 1), SMALL[1])
    assert refused.returncode == 2
    assert "belongs to a run with train_samples = 12, but now train_samples = 13" in refused.stderr

    shutil.rmtree(tmp_path / "pairs")
    stale = quickstart(tmp_path, *SMALL)
    assert stale.returncode == 2
    assert f"{tmp_path}/text_tokenizer is older than {tmp_path}/pairs" in stale.stderr
