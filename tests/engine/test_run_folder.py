"""The folder of a run refuses other settings, and its product appears whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from lavit_dist.config import build, config, load_config, save_config
from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.config.tokenizer import TrainTokenizerConfig
from lavit_dist.config.training import CheckpointConfig, LoggingConfig, OptimizerConfig
from lavit_dist.engine.run_folder import RunFolder
from lavit_dist.errors import UserError


@config
class SmallConfig:
    """An example of a stage's settings."""

    run_dir: str
    """Folder of the run."""
    total_steps: int = 10
    """Steps."""
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    num_threads: int | None = None
    """Threads."""


def open_run(folder: Path, *overrides: str) -> RunFolder:
    value = load_config(SmallConfig, None, [f"run_dir={folder}", *overrides])
    run = RunFolder(folder)
    run.open(value)
    return run


def test_the_resolved_settings_are_written_down(tmp_path: Path) -> None:
    run = open_run(tmp_path, "optimizer.betas=[0.8,0.9]")
    written = load_config(SmallConfig, run.config)
    assert written == load_config(SmallConfig, None, [f"run_dir={tmp_path}", "optimizer.betas=[0.8,0.9]"])


@pytest.mark.parametrize("override", ["total_steps=11", "optimizer.learning_rate=0.1", "optimizer.betas=[0.1,0.2]"])
def test_other_settings_are_refused_and_named(tmp_path: Path, override: str) -> None:
    open_run(tmp_path)
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=f"belongs to a run with {override.partition('=')[0]} = .* give this run another run_dir"):
        open_run(tmp_path, override)
    assert (tmp_path / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    "override", ["checkpoint.every_steps=3", "logging.every_steps=2", "num_threads=1", "checkpoint.keep_last=1"]
)
def test_what_changes_no_result_may_change(tmp_path: Path, override: str) -> None:
    open_run(tmp_path)
    open_run(tmp_path, override)
    assert override.rpartition(".")[2].partition("=")[0] in (tmp_path / "config.yaml").read_text()


def test_what_checkpoints_answer_for_may_change_until_the_run_is_done(tmp_path: Path) -> None:
    open_run(tmp_path)
    other = load_config(SmallConfig, None, [f"run_dir={tmp_path}", "total_steps=11"])
    run = RunFolder(tmp_path, may_change=("total_steps",))
    run.check_config(other)
    run.publish(lambda folder: (folder / "whole.bin").write_text("whole") and None)
    with pytest.raises(UserError, match="total_steps = 10, but now total_steps = 11"):
        run.check_config(other)


def test_the_product_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    run = open_run(tmp_path)

    def fail(folder: Path) -> None:
        (folder / "half.bin").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run.publish(fail)
    assert not run.done
    run.publish(lambda folder: (folder / "whole.bin").write_text("whole") and None)
    assert run.done
    assert [path.name for path in run.model.iterdir()] == ["whole.bin"]


def test_a_folder_in_which_another_run_works_is_refused(tmp_path: Path) -> None:
    first = open_run(tmp_path)
    with pytest.raises(UserError, match="Another run is at work in"):
        open_run(tmp_path)
    first.lock.release()
    open_run(tmp_path)


@pytest.mark.parametrize("content", ["", "{a: [", "just words"])
def test_damaged_settings_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"config.yaml is damaged.*remove it if"):
        open_run(tmp_path)


def test_a_run_dir_that_can_not_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(UserError, match=r"run_dir .* can't be written"):
            open_run(folder)


def test_phases_in_another_order_are_other_settings(tmp_path):
    phase = {"steps": 2, "train": ["merger"], "quantize": False}
    values = {"run_dir": str(tmp_path / "run"), "tower": "t", "images": {"shards": "s"}, "optimizer": {"warmup_steps": 0}}
    first, second = (build(TrainTokenizerConfig, values | {"phases": dict.fromkeys(names, phase)}) for names in ("ab", "ba"))
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    save_config(first, folder.config)
    folder.check_config(first)
    with pytest.raises(UserError, match="phases"):
        folder.check_config(second)


@pytest.mark.parametrize("changed", ["captions=one", "too_long=split", "supervise=second", "image_loss_weight=0.5"])
def test_a_pretraining_run_keeps_its_documents_and_supervision(tmp_path, changed):
    given = ["run_dir=run", "ids=ids", "text_tokenizer=text", "total_steps=9", "global_batch_size=2", "micro_batch_size=1"]
    folder = RunFolder(tmp_path)
    save_config(load_config(PretrainConfig, None, given), folder.config)
    folder.check_config(load_config(PretrainConfig, None, given))
    with pytest.raises(UserError, match=f"belongs to a run with documents.{changed.partition('=')[0]} ="):
        folder.check_config(load_config(PretrainConfig, None, [*given, f"documents.{changed}"]))
