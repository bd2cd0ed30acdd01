"""Files from strangers: nothing in them is run, and nothing is read or written outside of the folders that were named."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lavit_dist.checkpoint.tensor_file import TensorFile
from lavit_dist.config.base import config, load_config, save_config
from lavit_dist.config.id_cache import IdCacheConfig
from lavit_dist.config.ingest import IngestConfig
from lavit_dist.data.manifest import load_manifest
from lavit_dist.data.pairs import list_shards, read_pairs
from lavit_dist.errors import UserError
from pipelines.ingest import ingest

ROOT = Path(__file__).parents[1]


class Bomb:
    """What unpickling turns into a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def contents(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("form", ["pickle", "torch", "torch of before 1.6"])
def test_a_pickle_in_place_of_weights_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    path, harm = tmp_path / "weights.bin", tmp_path / "harmed"
    if form == "pickle":
        path.write_bytes(pickle.dumps({"weight": Bomb(harm)}))
    else:
        torch.save({"weight": Bomb(harm)}, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(UserError, match=r"weights\.bin is not a file of plain tensors"):
        TensorFile(path)
    assert not harm.exists()


@pytest.mark.parametrize(
    "value", ["!!python/object/apply:os.mkdir [harmed]", "!!python/name:os.mkdir", "!!python/object/new:os.mkdir {args: [harmed]}"]
)
def test_yaml_makes_no_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(f"source: {value}\nrun_dir: out\n")
    with pytest.raises(UserError, match=r"config\.yaml can't be read"):
        load_config(IngestConfig, "config.yaml")
    with pytest.raises(UserError):
        load_config(IngestConfig, None, [f"source={value}", "run_dir=out"])
    assert not (tmp_path / "harmed").exists()


def test_members_of_tars_stay_in_their_tar(tmp_path: Path, jpeg: Any) -> None:
    """Names that lead outside are keys like others, for nothing is ever unpacked; links are no files."""
    inside = tmp_path / "in" / "shards"
    inside.mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    with tarfile.open(inside / "00000.tar", "w") as tar:
        for name, data in (
            ("../../out.jpg", jpeg()),
            ("../../out.txt", b"a caption"),
            ("/etc/abs.jpg", jpeg()),
            ("/etc/abs.txt", b"b"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for kind, name in ((tarfile.SYMTYPE, "soft"), (tarfile.LNKTYPE, "hard")):
            link = tarfile.TarInfo(f"{name}.jpg")
            link.type, link.linkname = kind, str(tmp_path / "secret.jpg")
            tar.addfile(link)
            text = tarfile.TarInfo(f"{name}.txt")
            text.size = 1
            tar.addfile(text, io.BytesIO(b"x"))
    before = contents(tmp_path)
    pairs, refused = read_pairs(inside / "00000.tar")
    assert len(pairs) == 2
    assert {record.key for record in refused} >= {"soft", "hard"}
    assert "not_a_file" in {record.reason for record in refused}
    assert contents(tmp_path) == before

    out = tmp_path / "out"
    ingest(IngestConfig(source=str(inside), run_dir=str(out), heldout_fraction=0))
    assert contents(tmp_path) - before == contents(out) | {out}
    for shard in list_shards(out / "train"):
        with tarfile.open(shard) as tar:
            assert not [name for name in tar.getnames() if name.startswith("/") or ".." in Path(name).parts]


@pytest.mark.parametrize("name", ["../secret.jpg", "inner/../../secret.jpg", "ABSOLUTE"])
def test_a_captions_file_names_no_pictures_outside_of_its_folder(tmp_path: Path, jpeg: Any, name: str) -> None:
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    source = tmp_path / "source"
    source.mkdir()
    (source / "mine.jpg").write_bytes(jpeg())
    name = name.replace("ABSOLUTE", str(tmp_path / "secret.jpg"))
    rows = [{"image": name, "caption": "theirs"}, {"image": "mine.jpg", "caption": "ours"}]
    (source / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ingest(IngestConfig(source=str(source), run_dir=str(tmp_path / "out"), heldout_fraction=0))
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["quarantined"] == {"outside_folder": 1}
    ingest(IngestConfig(source=str(source), run_dir=str(tmp_path / "all"), heldout_fraction=0, image_root=str(tmp_path)))
    assert "outside_folder" not in json.loads((tmp_path / "all/summary.json").read_text())["quarantined"]


@pytest.mark.parametrize("name", ["../outside.arrow", "/etc/passwd", "..", "", "a/b.arrow", "a\\b.arrow"])
def test_a_manifest_that_points_elsewhere_is_refused(tmp_path: Path, write_id_set: Any, name: str) -> None:
    write_id_set(tmp_path / "ids", [[(3, 4)]])
    path = tmp_path / "ids/manifest.json"
    content = json.loads(path.read_text())
    content["shards"][0]["name"] = name
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="which is no plain file name"):
        load_manifest(tmp_path / "ids")


@config
class Stored:
    """Settings with a store."""

    id_cache: IdCacheConfig = IdCacheConfig()


def test_secrets_are_not_written_down(tmp_path: Path) -> None:
    options = {"key": "AKIA", "secret": "hush", "session_token": "hush", "endpoint_url": "http://store", "anon": False}
    save_config(Stored(id_cache=IdCacheConfig(storage_options=options)), tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert "hush" not in text
    assert "AKIA" not in text
    assert load_config(Stored, tmp_path / "config.yaml").id_cache.storage_options == {"endpoint_url": "http://store", "anon": False}

    run_dir = tmp_path / "run"
    run_dir.mkdir()
    failing = [sys.executable, "-c", "raise SystemExit(2)", f"run_dir={run_dir}", "id_cache.storage_options.secret=hush"]
    said = subprocess.run(
        [sys.executable, "launcher/supervise.py", "--", *failing], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert said.returncode == 2
    told = said.stdout + said.stderr + "".join(path.read_text() for path in run_dir.iterdir())
    assert "given up" in told
    assert "hush" not in told
