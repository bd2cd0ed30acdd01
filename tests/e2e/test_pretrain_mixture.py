"""Pretraining on several id sets: killed, then started again with other weights and one set more."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lavit_dist.checkpoint.llama_state import read_facts
from lavit_dist.data.manifest import Manifest
from lavit_dist.data.text_tokenizer import TextTokenizer
from lavit_dist.observe.metrics import METRICS_FILE, read_lines

STEPS, SAVE_EVERY, KILL_AFTER = 16, 2, 5
BATCH = 8
TIMEOUT = 180


@pytest.fixture
def start(
    repo_root: Path, pretrain_settings: dict[str, Any], write_id_set: Callable[..., Manifest], tmp_path: Path
) -> Callable[..., subprocess.Popen[str]]:
    """`start(*overrides)`: a run in tmp_path/run on two sources."""
    text = TextTokenizer.load(pretrain_settings["text_tokenizer"])
    for name, size in (("fine", 9), ("late", 12)):
        shards = [[(5 + index, 4) for index in range(size)]]
        write_id_set(tmp_path / name, shards, text_vocab_size=text.vocab_size, text_tokenizer=text.digest)
    settings = pretrain_settings | {
        "ids": None,
        "sources": {
            "pairs": {"ids": pretrain_settings["ids"], "weight": 3},
            "fine": {"ids": str(tmp_path / "fine"), "weight": 1},
        },
        "checkpoint": {"every_steps": SAVE_EVERY},
        "total_steps": STEPS,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))

    def begin(*overrides: str) -> subprocess.Popen[str]:
        command = [sys.executable, "launcher/pretrain.py", "--config", f"{tmp_path}/config.yaml", f"run_dir={tmp_path}/run"]
        return subprocess.Popen([*command, *overrides], cwd=repo_root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return begin


def test_a_run_goes_on_with_other_weights_and_one_more_source(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    metrics, checkpoints = tmp_path / "run" / METRICS_FILE, tmp_path / "run" / "checkpoints"
    killed = start("weigh_by=documents")
    deadline = time.monotonic() + TIMEOUT
    while len(read_lines(metrics)) < KILL_AFTER:
        assert killed.poll() is None and time.monotonic() < deadline, killed.communicate()[0]
        time.sleep(0.01)
    killed.kill()
    assert "shares of rows from row 0 on: fine " in killed.communicate()[0]
    saved = read_facts(checkpoints / (checkpoints / "latest").read_text().strip()).data
    resumed_row = saved["rows_consumed"]
    assert 0 < resumed_row < STEPS * BATCH

    changes = (f"sources.late.ids={tmp_path}/late", "sources.late.max_epochs=1", "sources.pairs.weight=1")
    said, _ = (resumed := start(*changes)).communicate(timeout=TIMEOUT)
    assert resumed.returncode == 0, said
    assert f"the source late is new from row {resumed_row} on" in said
    assert f"shares of rows from row {resumed_row} on: fine 0.3333, late 0.3333, pairs 0.3333" in said
    state = read_facts(checkpoints / f"step-{STEPS:08d}").data
    assert state["phases"][: len(saved["phases"])] == saved["phases"]
    assert state["phases"][1]["first_row"] == resumed_row
    assert state["sources"]["late"]["epoch"] == 1  # used up, and the others have its share
    assert sum(source["rows_consumed"] for source in state["sources"].values()) == STEPS * BATCH
    last = json.loads(read_lines(metrics)[-1])
    shares = {name: source["rows_consumed"] / STEPS / BATCH for name, source in state["sources"].items()}
    assert {name: last[f"rows/{name}"] for name in shares} == shares
    assert (tmp_path / "run" / "model").exists()
