"""Each kind of damage to an id set is named, and nothing else is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lavit_dist.config.base import build
from lavit_dist.config.id_cache import IdCacheConfig
from lavit_dist.data.id_set_check import check_sound, find_flaws
from lavit_dist.data.id_shard import Outcomes
from lavit_dist.data.manifest import Manifest, load_manifest, write_manifest
from lavit_dist.errors import UserError
from tests.data.folder_store import FolderStore  # noqa: F401  registers folderstore://
from tests.data.id_sets import Tar, write_set, write_texts
from tests.data.stored_ids import flip

SHARDS = [
    [Tar([1, 2], refused=["image_bomb"]), Tar([1], damaged=True)],
    [Tar([3], refused=["image_bomb", "unreadable_image"], filtered=2)],
    [Tar([], refused=["image_bomb"])],
]


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    write_set(tmp_path / "ids", SHARDS)
    return tmp_path / "ids"


def flaws(location: object, tmp_path: Path) -> list[tuple[str, str]]:
    cache = build(IdCacheConfig, {"folder": str(tmp_path / "cache"), "attempts": 1})
    return [(flaw.file, flaw.what) for flaw in find_flaws(load_manifest(str(location)), cache)]


def rewrite(path: Path, edit: Callable[[str], str]) -> None:
    path.write_text(edit(path.read_text()))


def alter_record(folder: Path, number: int, **changes: object) -> None:
    """Sidecar and manifest say something else of a shard, in agreement."""
    manifest: Manifest = load_manifest(folder)
    records = list(manifest.shards)
    records[number] = dataclasses.replace(records[number], **changes)
    (folder / f"shard-{number:05d}.json").write_text(json.dumps(dataclasses.asdict(records[number])))
    write_manifest(folder, records)


@pytest.mark.parametrize("url", ["{}", "file://{}", "folderstore://{}"])
def test_a_sound_set_has_no_flaw(ids, tmp_path, url):
    (ids / "README.md").write_text("whose ids these are")
    assert flaws(url.format(ids), tmp_path) == []


DAMAGE = {
    "altered": (lambda ids: flip(ids / "shard-00001.arrow"), "shard-00001.arrow", "its sha256 differs from manifest.json"),
    "missing": (lambda ids: (ids / "shard-00001.arrow").unlink(), "shard-00001.arrow", "is missing"),
    "no sidecar": (lambda ids: (ids / "shard-00000.json").unlink(), "shard-00000.json", "is missing, or not a sidecar"),
    "a torn sidecar": (
        lambda ids: rewrite(ids / "shard-00000.json", lambda text: text[:-9]),
        "shard-00000.json",
        "is missing, or not a sidecar",
    ),
    "another sidecar": (
        lambda ids: rewrite(ids / "shard-00000.json", lambda text: text.replace('"images": 3', '"images": 7')),
        "shard-00000.json",
        "images is 7, manifest.json says 3",
    ),
    "no quarantine file": (
        lambda ids: (ids / "shard-00002.quarantine.jsonl").unlink(),
        "shard-00002.quarantine.jsonl",
        "is missing",
    ),
    "a refusal lost": (
        lambda ids: rewrite(ids / "shard-00001.quarantine.jsonl", lambda text: text.splitlines(keepends=True)[1]),
        "shard-00001.quarantine.jsonl",
        "has 0 samples of image_bomb, manifest.json says 1",
    ),
    "a damaged input lost": (
        lambda ids: rewrite(ids / "shard-00000.quarantine.jsonl", lambda text: text.splitlines(keepends=True)[0]),
        "shard-00000.quarantine.jsonl",
        "has 0 inputs of truncated_tar, manifest.json says 1",
    ),
    "a torn quarantine file": (
        lambda ids: rewrite(ids / "shard-00002.quarantine.jsonl", lambda text: text[:-9]),
        "shard-00002.quarantine.jsonl",
        "has a line that is no record of a sample",
    ),
    "an unfinished file": (
        lambda ids: (ids / ".shard-00001.arrow.77.tmp").touch(),
        ".shard-00001.arrow.77.tmp",
        "was left by a program that was interrupted",
    ),
    "a stray shard": (lambda ids: (ids / "shard-00003.arrow").touch(), "shard-00003.arrow", "belongs to no shard"),
    "a stray sidecar": (lambda ids: (ids / "shard-00003.json").touch(), "shard-00003.json", "belongs to no shard"),
    "documents miscounted": (
        lambda ids: alter_record(ids, 0, documents=5),
        "shard-00000.arrow",
        "it holds documents 4, manifest.json says 5",
    ),
    "samples miscounted": (
        lambda ids: alter_record(ids, 1, outcomes=Outcomes(9, {"image_bomb": 1, "unreadable_image": 1}, {"similarity": 2})),
        "shard-00001.arrow",
        "it has 1 images, but 5 of its samples were used",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(ids, tmp_path, damage):
    inflict, file, what = DAMAGE[damage]
    inflict(ids)
    found = flaws(ids, tmp_path)
    assert [name for name, _ in found] == [file]
    assert what in found[0][1]


def test_a_store_is_looked_at_as_a_folder_is(ids, tmp_path):
    for damage in ("altered", "no sidecar", "a refusal lost", "an unfinished file"):
        DAMAGE[damage][0](ids)
    there = flaws(f"folderstore://{ids}", tmp_path)
    assert [name for name, _ in there] == [name for name, _ in flaws(ids, tmp_path)]
    assert len(there) == 4


def test_texts_need_not_have_as_many_images_as_samples(tmp_path):
    manifest = write_texts(tmp_path / "ids", 5)
    assert (manifest.shards[0].images, manifest.shards[0].outcomes.used) == (0, 5)
    assert flaws(tmp_path / "ids", tmp_path) == []


def test_copying_a_flawed_set_is_refused_with_what_is_wrong(ids):
    check_sound(load_manifest(ids))
    flip(ids / "shard-00000.arrow")
    (ids / "shard-00001.json").unlink()
    with pytest.raises(
        UserError, match=r"has 2 flaws \(shard-00000\.arrow its sha256 differs .*; shard-00001\.json is missing, .*\)"
    ):
        check_sound(load_manifest(ids))
