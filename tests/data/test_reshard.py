"""Whatever the shards, the documents, their order and what became of the samples stay the same."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lavit_dist.config.id_cache import IdCacheConfig
from lavit_dist.data import reshard as resharding
from lavit_dist.data.captions import caption_groups
from lavit_dist.data.id_set_check import find_flaws
from lavit_dist.data.id_shards import IdShards
from lavit_dist.data.manifest import Manifest
from lavit_dist.data.merge_id_sets import merge
from lavit_dist.data.reshard import reshard
from lavit_dist.errors import UserError
from tests.data.id_sets import ENCODING, Tar, sets, write_set

FULL = Tar([1] * 40)


def documents(manifest: Manifest) -> list[dict]:
    """All columns of all documents, in order."""
    return [document for shard in IdShards(manifest) for document in shard.batch.to_pylist()]


def refusals(manifest: Manifest) -> Counter[str]:
    return Counter(line for path in Path(manifest.folder).glob("*.quarantine.jsonl") for line in path.read_text().splitlines())


def totals(manifest: Manifest) -> Counter[str]:
    found: Counter[str] = Counter()
    for record in manifest.shards:
        found.update(documents=record.documents, images=record.images, samples=record.outcomes.samples, used=record.outcomes.used)
        for kind in ("quarantined", "filtered", "damaged_inputs"):
            found.update({f"{kind} {reason}": count for reason, count in getattr(record.outcomes, kind).items()})
    return found


def inputs(manifest: Manifest) -> set:
    return {file for record in manifest.shards for file in record.inputs}


def arrow_files(manifest: Manifest) -> list[bytes]:
    return [(Path(manifest.folder) / record.name).read_bytes() for record in manifest.shards]


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same(old: Manifest, new: Manifest) -> None:
    assert documents(new) == documents(old)
    assert totals(new) == totals(old)
    assert refusals(new) == refusals(old)
    assert inputs(new) == inputs(old)
    assert find_flaws(new, IdCacheConfig()) == []


@given(shards=sets, size=st.floats(40, 4000), data=st.data())
@settings(max_examples=25)
def test_any_set_in_shards_of_any_size_is_the_same_set(shards, size, data):
    with TemporaryDirectory() as folder:
        old = write_set(Path(folder) / "old", shards)
        new = reshard(old, Path(folder) / "new", shard_bytes=size)
        assert_same(old, new)
        images = sum(record.images for record in new.shards)
        assert sum(int(caption_groups(shard)[-1]) + 1 for shard in IdShards(new)) == images  # captions of an image stay together
        number = data.draw(st.integers(1, len(new.shards)))
        straight = reshard(old, Path(folder) / "straight", shard_bytes=size * len(new.shards) / number)
        by_way = reshard(new, Path(folder) / "by way", shard_bytes=size * len(new.shards) / number)
        assert_same(old, by_way)
        assert arrow_files(by_way) == arrow_files(straight)  # whatever the set was cut into before


@given(shards=sets, others=sets)
@settings(max_examples=15)
def test_a_merged_set_is_its_sets_one_after_the_other(shards, others):
    with TemporaryDirectory() as folder:
        first, second = (write_set(Path(folder) / name, each, name=name) for name, each in (("a", shards), ("bb", others)))
        merged = merge([first, second], Path(folder) / "merged")
        assert documents(merged) == documents(first) + documents(second)
        assert totals(merged) == totals(first) + totals(second)
        assert refusals(merged) == refusals(first) + refusals(second)
        assert inputs(merged) == inputs(first) | inputs(second)
        assert find_flaws(merged, IdCacheConfig()) == []
        assert_same(merged, reshard(merged, Path(folder) / "resharded", num_shards=1))


def test_the_bytes_of_documents_are_those_of_their_file(tmp_path):
    few, many = ([Tar([1, 2, 1] * number)] for number in (20, 320))
    grown = {}
    for name, tars in (("few", few), ("many", many)):
        manifest = write_set(tmp_path / name, [tars])
        told = int(resharding.document_bytes(IdShards(manifest)[0].batch).sum())
        grown[name] = np.array([told, manifest.shards[0].size])
    told, taken = grown["many"] - grown["few"]  # what a file has once is in both
    assert abs(taken - told) < 12 * 64  # each column is filled up to whole words


def test_shards_are_as_many_and_as_large_as_asked_for(tmp_path):
    old = write_set(tmp_path / "old", [[FULL], [FULL, FULL]])
    assert [record.documents for record in reshard(old, tmp_path / "one", num_shards=1).shards] == [120]
    seven = reshard(old, tmp_path / "seven", num_shards=7)
    assert len(seven.shards) == 7
    sizes = [int(resharding.document_bytes(shard.batch).sum()) for shard in IdShards(seven)]
    assert max(sizes) - min(sizes) < 1000  # two documents and their captions
    by_size = reshard(old, tmp_path / "by size", shard_bytes=sum(sizes) / 7)
    assert everything(tmp_path / "by size") == everything(tmp_path / "seven")
    assert by_size.fingerprint == seven.fingerprint


def test_back_in_its_old_cuts_a_set_has_its_old_arrow_files(tmp_path):
    old = write_set(tmp_path / "old", [[FULL], [Tar([2, 3, 1], refused=["image_bomb"])]])
    three = reshard(old, tmp_path / "three", num_shards=3)
    back = reshard(reshard(three, tmp_path / "five", num_shards=5), tmp_path / "back", num_shards=3)
    assert arrow_files(back) == arrow_files(three)
    one = reshard(old, tmp_path / "one", num_shards=1)
    assert arrow_files(one) == arrow_files(write_set(tmp_path / "written", [[FULL, Tar([2, 3, 1])]]))  # as if written so


def test_what_an_interrupted_run_left_is_replaced(tmp_path, monkeypatch):
    old = write_set(tmp_path / "old", [[FULL], [FULL]])

    class KilledError(BaseException):
        pass

    def fail(*_):
        left.update(everything(tmp_path / ".new.tmp"))
        raise KilledError

    left: dict[str, bytes] = {}
    with monkeypatch.context() as patch:
        patch.setattr(resharding, "write_manifest", fail)
        with pytest.raises(KilledError):
            reshard(old, tmp_path / "new", num_shards=5)
    assert len(left) == 15 and "manifest.json" not in left
    assert not (tmp_path / "new").exists()
    (tmp_path / ".new.tmp").mkdir()
    for name, content in left.items():  # what a kill leaves
        (tmp_path / ".new.tmp" / name).write_bytes(content)
    assert_same(old, reshard(old, tmp_path / "new", num_shards=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]
    with pytest.raises(UserError, match="new is there already"):
        reshard(old, tmp_path / "new", num_shards=2)


def test_what_cannot_be_cut_is_refused(tmp_path):
    old = write_set(tmp_path / "old", [[Tar([3, 3])]])
    with pytest.raises(UserError, match="--shards 3 is too many for the 6 documents"):
        reshard(old, tmp_path / "new", num_shards=3)
    with pytest.raises(UserError, match="--shards 0 must be at least 1"):
        reshard(old, tmp_path / "new", num_shards=0)
    with pytest.raises(UserError, match="--shard-mb must be above 0"):
        reshard(old, tmp_path / "new", shard_bytes=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]


def test_tars_of_one_name_are_merged_and_not_mixed(tmp_path):
    first, second = write_set(tmp_path / "a", [[FULL]]), write_set(tmp_path / "b", [[Tar([2, 1])]], content="other")
    merged = merge([first, second], tmp_path / "merged")
    assert documents(merged) == documents(first) + documents(second)
    with pytest.raises(UserError, match=r"was made from two tars 00000\.tar"):
        reshard(merged, tmp_path / "new", num_shards=1)


def test_sets_that_do_not_belong_together_are_refused(tmp_path):
    ours = write_set(tmp_path / "ours", [[FULL], [Tar([1])]])
    encoding = dataclasses.replace(ENCODING, preprocessing="larger", codebook_size=99)
    theirs = write_set(tmp_path / "theirs", [[FULL]], name="t", encoding=encoding)
    with pytest.raises(UserError, match="preprocessing preprocessing and larger; codebook_size 70 and 99"):
        merge([ours, theirs], tmp_path / "new")
    with pytest.raises(UserError, match=r"have 00000\.tar, shard-00000\.arrow in common"):
        merge([ours, write_set(tmp_path / "part", [[FULL]])], tmp_path / "new")
    with pytest.raises(UserError, match="two id sets or more"):
        merge([ours], tmp_path / "new")
    assert not (tmp_path / "new").exists()
