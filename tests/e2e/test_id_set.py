"""data_prep/id_set.py: what a set is, what is in it, and copies of it, as a user asks for them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data_prep.id_set import FLAWED, parse, run
from lavit_dist.data.manifest import load_manifest
from lavit_dist.errors import UserError
from tests.data.id_sets import Tar, write_set
from tests.data.stored_ids import flip

SHARDS = [[Tar([2] * 30, refused=["image_bomb"])], [Tar([1] * 20, filtered=3)]]


def call(*words: object) -> None:
    run(parse([str(word) for word in words]))


def test_a_set_is_verified_counted_cut_and_merged(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    write_set(first, SHARDS)
    write_set(second, [[Tar([1] * 5)]], name="s")
    call("verify", f"file://{first}")
    assert "2 shards, 80 documents of 50 images: as the manifest says" in " ".join(capsys.readouterr().out.split())
    call("reshard", first, "--output", tmp_path / "cut", "--shards", 4)
    call("reshard", tmp_path / "cut", "--output", tmp_path / "large", "--shard-mb", 1)
    call("merge", tmp_path / "large", second, "--output", tmp_path / "both")
    assert [shard.documents for shard in load_manifest(tmp_path / "both").shards] == [80, 5]
    call("verify", tmp_path / "both")
    call("deduplicate", tmp_path / "both", "--output", tmp_path / "unique", "--against", second)
    kept, before = (sum(shard.images for shard in load_manifest(tmp_path / name).shards) for name in ("unique", "both"))
    assert 0 < kept < before - 5
    call("verify", tmp_path / "unique")
    capsys.readouterr()
    call("stats", tmp_path / "both", "attempts=1", "--output", tmp_path / "stats")
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("documents 85", "images 55", "refused, image_bomb 1", "filtered, similarity 3", "samples of its inputs 59"):
        assert words in printed
    values = json.loads((tmp_path / "stats" / "stats.json").read_text())
    assert values["fingerprint"] == load_manifest(tmp_path / "both").fingerprint
    charts = sorted(path.name for path in (tmp_path / "stats").glob("*.png"))
    assert charts == ["code-frequencies.png", "lengths-document.png", "lengths-image.png", "lengths-text.png"]
    for name in charts:
        assert len(Image.open(tmp_path / "stats" / name).convert("L").getcolors()) > 20  # something is drawn


def test_a_flawed_set_ends_with_code_1_and_is_not_copied(tmp_path, capsys):
    write_set(tmp_path / "ids", SHARDS)
    flip(tmp_path / "ids/shard-00001.arrow")
    (tmp_path / "ids/shard-00000.json").unlink()
    with pytest.raises(SystemExit) as ended:
        call("verify", tmp_path / "ids")
    assert ended.value.code == FLAWED
    printed = capsys.readouterr().out
    assert "shard-00001.arrow" in printed and "shard-00000.json" in printed and "2 files FAIL" in printed
    for words in (("reshard", tmp_path / "ids", "--shards", 1), ("merge", tmp_path / "ids", tmp_path / "ids")):
        with pytest.raises(UserError, match="has 2 flaws"):
            call(*words, "--output", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_remote_sets_are_not_copied(tmp_path):
    write_set(tmp_path / "ids", SHARDS)
    with pytest.raises(UserError, match="is not on this machine"):
        call("reshard", f"folderstore://{tmp_path}/ids", "--shards", 1, "--output", tmp_path / "new")


@pytest.mark.parametrize("words", [(), ("reshard", "a", "--output", "b"), ("merge", "a"), ("reshard", "a", "--shards", "1")])
def test_half_a_command_line_ends_with_code_2(words):
    with pytest.raises(SystemExit) as ended:
        parse(list(words))
    assert ended.value.code == 2


def test_the_program_says_what_is_no_set(repo_root: Path, tmp_path):
    command = [sys.executable, "data_prep/id_set.py", "verify", str(tmp_path)]
    result = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert "holds no id set" in result.stderr and "Traceback" not in result.stderr
