"""launcher/inspect_data.py: rows of a run in words and pictures, and the audit of its epochs, whose exit code tells a script."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from launcher.inspect_data import exit_unless, parse_rows
from lavit_dist.checkpoint.official import load_visual_tokenizer
from lavit_dist.config.base import build
from lavit_dist.config.ingest import IngestConfig
from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.data.global_batches import GlobalBatches
from lavit_dist.data.id_shard import Encoding, InputFile
from lavit_dist.data.id_shard_writer import write_id_shard
from lavit_dist.data.manifest import Manifest, write_manifest
from lavit_dist.data.pairs import list_shards
from lavit_dist.data.rows import RowDataset
from lavit_dist.data.spans import Spans
from lavit_dist.data.text_tokenizer import TextTokenizer
from lavit_dist.errors import UserError
from lavit_dist.evaluation.row_picture import WIDTH
from lavit_dist.files import sha256
from pipelines import inspect_data
from pipelines.ingest import ingest
from pipelines.pretrain import open_batches
from tests.encode_tar import encode_tar

STEPS = 6


def launch(repo_root: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launcher/inspect_data.py", *map(str, arguments)]
    return subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def settings(pretrain_settings: dict[str, Any]) -> dict[str, Any]:
    return pretrain_settings | {"run_dir": "never written", "total_steps": STEPS}


@pytest.fixture(scope="module")
def config_file(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "pretrain.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def world_settings(tiny_world: Path, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run on the tiny world's ids, beside which its pairs lie."""
    plans = tmp_path_factory.mktemp("plans")
    return settings | {
        "ids": str(tiny_world / "ids/train"),
        "text_tokenizer": str(tiny_world / "language_model"),
        "plan_cache": str(plans),
    }


def test_rows_are_printed_and_drawn_and_the_run_is_left_alone(repo_root: Path, config_file: Path, tmp_path: Path) -> None:
    result = launch(repo_root, config_file, "--rows", "0:4", "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert [line.split(":")[0] for line in result.stdout.splitlines() if line.startswith("Row ")] == [f"Row {n}" for n in range(4)]
    assert re.search(
        r"  \d+  [01]-\d+  shard-0000[01].arrow, document \d+  (image then text|text then image); \d+ tokens", result.stdout
    )
    assert re.search(r"\[IMG\] \d+ codes \[/IMG\]", result.stdout)
    assert "<img_" not in result.stdout
    assert "00000.tar was looked for in" in result.stdout
    drawn = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert drawn == [f"row-{number:06d}.png" for number in range(4)]
    for name in drawn:
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.width == WIDTH and picture.height > 200
    assert not (repo_root / "never written").exists()


def test_the_pictures_are_found_beside_the_ids(world_settings: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    config = build(PretrainConfig, world_settings)
    inspect_data.show(config, range(2), str(tmp_path))
    out = capsys.readouterr().out
    assert "not at hand" not in out
    with Image.open(tmp_path / "row-000000.png") as found:
        colours = len(np.unique(np.asarray(found).reshape(-1, 3), axis=0))
    inspect_data.show(config, range(1), str(tmp_path), images=str(tmp_path))
    assert f"of its pictures are not at hand: 00000.tar was looked for in {tmp_path}, {tmp_path}/train." in capsys.readouterr().out
    with Image.open(tmp_path / "row-000000.png") as absent:
        assert len(np.unique(np.asarray(absent).reshape(-1, 3), axis=0)) < colours


def test_photographs_from_pictures_to_rows(
    photos: Path, tiny_world: Path, world_settings: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    """Shown and counted as they went in: 51 photographs of five captions or so."""
    ingest(IngestConfig(source=str(photos), run_dir=str(tmp_path / "pairs"), heldout_fraction=0, samples_per_shard=20))
    text = TextTokenizer.load(world_settings["text_tokenizer"])
    visual = load_visual_tokenizer(tiny_world / "tokenizer").requires_grad_(False).eval()
    encoding = Encoding("visual", text.digest, "preprocessing", "settings", text.vocab_size, visual.config.codebook.size)
    records = []
    with torch.inference_mode():
        for tar in list_shards(tmp_path / "pairs/train"):
            inputs = [InputFile(tar.name, tar.stat().st_size, sha256(tar))]
            path = tmp_path / "ids/train" / f"{tar.stem}.arrow"
            records.append(write_id_shard(path, encode_tar(visual, text, tar)[0], encoding=encoding, inputs=inputs))
    manifest = write_manifest(path.parent, records)
    documents = sum(record.documents for record in manifest.shards)
    model = world_settings["model"] | {"max_position_embeddings": 512}
    photographs = world_settings | {"ids": str(path.parent), "seq_len": 512, "model": model}
    inspect_data.show(build(PretrainConfig, photographs), range(3), str(tmp_path / "out"))
    assert "not at hand" not in capsys.readouterr().out
    for policy, expected in (({"captions": "all"}, documents), ({"captions": "one"}, 51)):
        assert inspect_data.audit(build(PretrainConfig, photographs | {"documents": policy}), epoch=1)
        assert re.search(r"documents +(\d+)", capsys.readouterr().out).group(1) == str(expected)  # type: ignore[union-attr]


def test_an_epoch_that_holds_ends_with_code_0(repo_root: Path, config_file: Path) -> None:
    result = launch(repo_root, "--config", config_file, "--audit", "--epoch", "1", "seq_len=96")
    assert result.returncode == 0, result.stderr
    assert "every document that fits comes exactly once" in result.stdout
    assert re.search(r"^ids: epoch 1 of ", result.stdout)
    assert re.search(r"documents +400\n", result.stdout)
    assert re.search(r"padding +\d+\.\d{3}% of [\d,]+ slots", result.stdout)


class Broken(RowDataset):
    """Row 1 comes again in place of row 2."""

    def row_spans(self, row: int) -> Spans:
        return super().row_spans(1 if row == 2 else row)


def test_an_epoch_that_does_not_hold_ends_with_code_1(settings: dict[str, Any], capsys: Any) -> None:
    right = open_batches(build(PretrainConfig, settings)).rows.sources["ids"]
    rows = Broken(right.manifest, right.vocabulary, right.eos_id, 128, 0, 0.1)
    with pytest.raises(SystemExit) as stopped:
        exit_unless(inspect_data.audit_batches(GlobalBatches(rows, 8), 0))
    assert stopped.value.code == 1
    out = capsys.readouterr().out
    assert "comes 2 times." in out and "FAIL: " in out
    exit_unless(inspect_data.audit_batches(GlobalBatches(right, 8), 0))


@pytest.fixture
def mixture_settings(settings: dict[str, Any], write_id_set: Callable[..., Manifest], tmp_path: Path) -> dict[str, Any]:
    text = TextTokenizer.load(settings["text_tokenizer"])
    write_id_set(tmp_path / "fine", [[(9, 4)] * 20], text_vocab_size=text.vocab_size, text_tokenizer=text.digest)
    sources = {
        "pairs": {"ids": settings["ids"], "weight": 3},
        "fine": {"ids": str(tmp_path / "fine"), "weight": 1, "max_epochs": 1},
    }
    return settings | {"ids": None, "sources": sources}


def test_the_sources_of_a_mixture_together_and_alone(mixture_settings: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    config = build(PretrainConfig, mixture_settings)
    inspect_data.show(config, range(8), str(tmp_path / "all"))
    both = capsys.readouterr().out
    assert len(re.findall(r" of fine \(its row [01]\);", both)) == 2
    assert len(re.findall(r" of pairs[; ]", both)) == 6
    inspect_data.show(config, range(2), str(tmp_path / "one"), source="fine")
    assert capsys.readouterr().out.count("epoch 0 of fine; ") == 2
    inspect_data.show(config, range(2, 4), str(tmp_path / "late"), source="fine", images=str(tmp_path))
    assert f"looked for in {tmp_path}, {tmp_path}/fine." in capsys.readouterr().out
    assert inspect_data.audit(config, 0)
    assert re.findall(r"^(\w+): epoch 0", capsys.readouterr().out, re.MULTILINE) == ["pairs", "fine"]
    assert inspect_data.audit(config, 0, source="fine")
    assert re.findall(r"^(\w+): epoch 0", capsys.readouterr().out, re.MULTILINE) == ["fine"]
    with pytest.raises(UserError, match="--source coarse is no source of this run; choose of pairs, fine"):
        inspect_data.audit(config, 0, source="coarse")


def test_rows_behind_the_end_of_the_run_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    config = build(PretrainConfig, settings)
    with pytest.raises(UserError, match=f"ends behind the run's {8 * STEPS} rows"):
        inspect_data.show(config, range(8 * STEPS, 8 * STEPS + 1), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    inspect_data.show(config, range(8 * STEPS - 1, 8 * STEPS), str(tmp_path / "out"))
    inspect_data.show(config, range(999, 1000), str(tmp_path / "out"), source="ids")


@pytest.mark.parametrize(("words", "rows"), [("0:4", range(4)), ("7", range(7, 8)), ("12:13", range(12, 13))])
def test_rows_as_they_are_written(words: str, rows: range) -> None:
    assert parse_rows(words) == rows


@pytest.mark.parametrize("words", ["4:0", "3:3", "-1:2", "a:b", "", "1:", "1:2:3"])
def test_rows_that_are_none(words: str) -> None:
    with pytest.raises(UserError, match="names no rows"):
        parse_rows(words)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("{config}",), "Nothing to do"),
        (("--rows", "0:4"), "none is named"),
        (("{config}", "--config", "{config}", "--audit"), "give CONFIG once"),
        (("{config}", "--rows", "4:0"), "--rows 4:0 names no rows"),
        (("{config}", "--audit", "--epoch", "-1"), "--epoch -1"),
        (("nowhere.yaml", "--audit"), "nowhere.yaml"),
        (("{config}", "--audit", "seq_length=9"), "did you mean 'seq_len'?"),
        (("{config}", "--rows", "0:4", "--images", "/nowhere"), "--images /nowhere is no folder"),
        (("{config}", "--audit", "ids=/nowhere"), "/nowhere holds no id set"),
    ],
)
def test_a_wrong_command_is_one_sentence(repo_root: Path, config_file: Path, arguments: tuple[str, ...], named: str) -> None:
    result = launch(repo_root, *(argument.format(config=config_file) for argument in arguments))
    assert result.returncode == 2, result.stderr
    assert named in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""
