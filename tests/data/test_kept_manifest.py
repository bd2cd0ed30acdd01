"""A resume on another id set is refused with the shards that differ."""

import dataclasses
import hashlib
import json

import pytest

from lavit_dist.data.id_shard import Outcomes
from lavit_dist.data.kept_manifest import check_fingerprint, keep_manifest
from lavit_dist.data.manifest import MANIFEST, load_manifest, write_manifest
from lavit_dist.errors import UserError

SHARDS = [[(5, 3), (4, 2)], [(6, 1)], [(2, 2)], [(3, 3)]]


@pytest.fixture
def kept(tmp_path, write_id_set):
    """The fingerprint that a run was started with, and where the run keeps the manifest."""
    manifest = write_id_set(tmp_path / "ids", SHARDS)
    keep_manifest(tmp_path / "run", manifest, {})
    return manifest.fingerprint, tmp_path / "run"


def refusal(kept, manifest):
    with pytest.raises(UserError) as caught:
        check_fingerprint(kept[0], manifest, kept[1])
    assert str(caught.value).startswith(f"The checkpoint was trained on the id set {kept[0][:16]}, but {manifest.folder} is ")
    assert str(caught.value).endswith("; give the set it was trained on, or start a new run.")
    return str(caught.value)


def test_the_copy_is_the_manifest_itself(kept, tmp_path):
    (copy,) = kept[1].iterdir()
    assert copy.name == f"{kept[0]}.manifest.json"
    assert hashlib.sha256(copy.read_bytes()).hexdigest() == kept[0]
    check_fingerprint(kept[0], load_manifest(tmp_path / "ids"), kept[1])


def test_the_shards_that_differ_are_named(kept, tmp_path, write_id_set):
    write_id_set(tmp_path / "ids", [*SHARDS[:3], [(3, 4)]])
    assert "of 4 shards there are 1 changed (shard-00003.arrow);" in refusal(kept, load_manifest(tmp_path / "ids"))
    write_id_set(tmp_path / "ids", [SHARDS[0], [(6, 2)]])
    said = refusal(kept, load_manifest(tmp_path / "ids"))
    assert "of 4 shards there are 1 changed (shard-00001.arrow), 2 missing (shard-00002.arrow, shard-00003.arrow);" in said
    write_id_set(tmp_path / "ids", [*SHARDS, *[[(1, 1)]] * 7])
    said = refusal(kept, load_manifest(tmp_path / "ids"))
    assert "7 new (shard-00004.arrow, shard-00005.arrow, shard-00006.arrow, shard-00007.arrow, shard-00008.arrow, …);" in said


def test_a_record_that_differs_is_named_too(kept, tmp_path):
    manifest = load_manifest(tmp_path / "ids")
    other = dataclasses.replace(manifest.shards[2], outcomes=Outcomes(9, {"bomb": 1}))
    said = refusal(kept, write_manifest(tmp_path / "ids", [*manifest.shards[:2], other, manifest.shards[3]]))
    assert "1 with the same ids and another record (shard-00002.arrow)" in said


def test_the_same_records_written_otherwise(kept, tmp_path):
    path = tmp_path / "ids" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert "the shards are the same, but their manifest is written otherwise" in refusal(kept, load_manifest(tmp_path / "ids"))


@pytest.mark.parametrize("loss", ["gone", "damaged"])
def test_without_the_copy_it_is_refused_all_the_same(kept, tmp_path, write_id_set, loss):
    (copy,) = kept[1].iterdir()
    copy.unlink() if loss == "gone" else copy.write_bytes(copy.read_bytes()[:-9])
    write_id_set(tmp_path / "ids", SHARDS[1:])
    assert "shards" not in refusal(kept, load_manifest(tmp_path / "ids"))


def test_a_damaged_copy_is_written_again(kept, tmp_path):
    (copy,) = kept[1].iterdir()
    content = copy.read_bytes()
    copy.write_bytes(content[:-9])
    keep_manifest(kept[1], load_manifest(tmp_path / "ids"), {})
    assert copy.read_bytes() == content


def test_a_set_that_changes_during_the_start_is_refused(tmp_path, write_id_set):
    manifest = write_id_set(tmp_path / "ids", SHARDS)
    write_id_set(tmp_path / "ids", SHARDS[1:])
    with pytest.raises(UserError, match=r"manifest\.json was changed while this run started"):
        keep_manifest(tmp_path / "run", manifest, {})
