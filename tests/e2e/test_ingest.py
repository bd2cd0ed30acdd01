"""Pairs in, by the entry points that users run."""

import json
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from lavit_dist.data.pair_batches import PairDataset
from lavit_dist.data.pairs import list_shards
from lavit_dist.data.quarantine import read_quarantine


@pytest.fixture
def run(repo_root):
    """`run(script, *arguments)`: the finished process of an entry point under data_prep/."""

    def start(script, *arguments):
        command = [sys.executable, f"data_prep/{script}.py", *arguments]
        return subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=120, check=False)

    return start


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_photographs_as_they_are(run, photos, tmp_path):
    arguments = (f"source={photos}", f"run_dir={tmp_path}/pairs", "heldout_fraction=0.1")
    result = run("ingest", *arguments)
    assert result.returncode == 0, result.stderr
    rows = {row["key"]: row for row in map(json.loads, photos.read_text().splitlines())}
    splits = {split: PairDataset(list_shards(tmp_path / "pairs" / split), 32) for split in ("train", "heldout")}
    found = {sample.key: sample for dataset in splits.values() for sample in dataset.samples}
    assert found.keys() == rows.keys()
    assert len(splits["train"]) + len(splits["heldout"]) == len(rows) == 51
    assert len(splits["heldout"]) >= 1
    for key, sample in found.items():
        assert sample.captions == tuple(caption.strip() for caption in rows[key]["captions"])
        assert sample.image_location.size == (photos.parent / rows[key]["image"]).stat().st_size
        assert sample.metadata["license"] == rows[key]["license"]
    assert "quarantined: none" in result.stderr.splitlines()[-1]

    before = snapshot(tmp_path / "pairs")
    again = run("ingest", *arguments)
    assert again.returncode == 0
    assert "is complete already" in again.stderr
    assert snapshot(tmp_path / "pairs") == before


def test_bad_pairs_are_named_and_the_job_goes_on(run, photos, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    good = sorted((photos.parent / "images").iterdir())[:3]
    rows = [{"image": str(path), "caption": "fine"} for path in good]
    (source / "page.jpg").write_text("<html>not found</html>")
    (source / "cut.jpg").write_bytes(good[0].read_bytes()[:3000])
    Image.new("1", (2000, 1000)).save(source / "bomb.png")
    rows += [{"image": f"{name}", "caption": "bad"} for name in ("page.jpg", "cut.jpg", "bomb.png", "absent.jpg")]
    rows += [
        {"image": str(good[0].parent / ".." / "images" / good[0].name), "caption": " "},
        {"key": "../evil", "image": "a.b.jpg", "caption": "ok"},
    ]
    shutil.copy(good[1], source / "a.b.jpg")
    (source / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    roots = ("image_root=/",)  # the photographs lie elsewhere than the captions file
    result = run("ingest", f"source={source}", f"run_dir={tmp_path}/pairs", "max_pixels=1500000", "num_threads=2", *roots)
    assert result.returncode == 0, result.stderr
    records = [record for path in (tmp_path / "pairs").rglob("*.quarantine.jsonl") for record in read_quarantine(path)]
    expected = {"page": "web_page", "cut": "unreadable_image", "bomb": "image_bomb", "absent": "missing_image"}
    reasons = {record.key: record.reason for record in records}
    assert {key: reasons.get(key) for key in expected} == expected
    assert sorted(record.reason for record in records) == sorted([*expected.values(), "empty_caption"])
    assert all(record.sha256 for record in records if record.reason in ("unreadable_image", "image_bomb"))
    keys = {path.stem for path in good}
    written = {s.key for split in ("train", "heldout") for s in PairDataset(list_shards(tmp_path / "pairs" / split), 8).samples}
    assert written - keys == {key for key in written if key.startswith("_evil-")}
    assert len(written) == 4
    assert "empty_caption 1, image_bomb 1, missing_image 1, unreadable_image 1, web_page 1" in result.stderr.splitlines()[-1]


def test_one_pair_can_not_be_held_out_from_itself(run, tmp_path):
    (tmp_path / "set").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "set/a.jpg")
    (tmp_path / "set/a.txt").write_text("a picture")
    arguments = (f"source={tmp_path / 'set'}", f"run_dir={tmp_path / 'pairs'}")
    refused = run("ingest", *arguments, "heldout_fraction=0.1")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("error: ")
    assert "one usable pair" in refused.stderr
    assert not (tmp_path / "pairs/summary.json").exists()
    shutil.rmtree(tmp_path / "pairs")
    assert run("ingest", *arguments, "heldout_fraction=0").returncode == 0
