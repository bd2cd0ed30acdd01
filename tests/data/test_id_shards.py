"""Shards from wherever they lie: opened once, bounded in number, found damaged or missing with their names."""

import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lavit_dist.config.base import build
from lavit_dist.config.id_cache import IdCacheConfig
from lavit_dist.data.global_batches import GlobalBatches
from lavit_dist.data.id_shard import IdShardHead
from lavit_dist.data.id_shards import IdShards
from lavit_dist.data.manifest import load_manifest
from lavit_dist.data.rows import RowDataset
from lavit_dist.errors import UserError
from lavit_dist.models.vocabulary import Vocabulary
from tests.data.folder_store import logged, steer
from tests.data.stored_ids import SHARDS, cached, content, downloads, flip, others, wait_for

REPOSITORY = Path(__file__).parents[2]


def test_shards_from_a_store_are_those_on_disk(ids, open_shards):
    local, remote = IdShards(load_manifest(ids)), open_shards()
    assert len(local) == len(remote) == SHARDS
    assert [content(remote, index) for index in range(SHARDS)] == [content(local, index) for index in range(SHARDS)]
    assert [remote.head(index).document_hash.tolist() for index in range(SHARDS)] == [
        shard.document_hash.tolist() for shard in local
    ]
    with pytest.raises(IndexError):
        local[SHARDS]


@pytest.mark.parametrize("url", ["file://{}", "folderstore://{}", "folderstore://{}/"])
def test_rows_of_a_url_are_those_of_the_folder(ids, tmp_path, url):
    vocabulary = Vocabulary(50, 70)
    cache = build(IdCacheConfig, {"folder": str(tmp_path / "cache"), "bytes": 3 * (ids / "shard-00000.arrow").stat().st_size})
    settings = {"vocabulary": vocabulary, "eos_id": 0, "seq_len": 48, "seed": 0, "caption_dropout": 0.1, "min_block_documents": 30}
    here, there = (RowDataset(load_manifest(place), id_cache=cache, **settings) for place in (ids, url.format(ids)))
    for row in range(here.rows_before_epoch(2)):
        assert [a.tolist() for a in here.row_tokens(row)] == [a.tolist() for a in there.row_tokens(row)]
    assert here.plan_digest == there.plan_digest


def test_what_packing_needs_is_read_without_fetching_shards(ids, open_shards, tmp_path):
    local, remote = IdShards(load_manifest(ids)), open_shards()
    for index in range(SHARDS):
        here, there = (shards.head(index) for shards in (local, remote))
        for field in ("document_hash", "segment_kinds", "segment_starts", "segment_lengths", "caption_index"):
            assert np.array_equal(getattr(here, field), getattr(there, field))
        assert all(map(np.array_equal, here.source, there.source))
    assert downloads(ids) == []
    assert cached(tmp_path) == []


def test_a_store_that_gives_no_parts_of_files_gives_whole_ones(ids, open_shards, tmp_path):
    local, remote = IdShards(load_manifest(ids)), open_shards(room=2)
    steer(ids, parts="no")
    with ThreadPoolExecutor(4) as pool:
        heads = list(pool.map(remote.head, range(SHARDS)))
    assert [head.document_hash.tolist() for head in heads] == [shard.document_hash.tolist() for shard in local]
    assert sorted(downloads(ids)) == [f"shard-0000{index}.arrow" for index in range(SHARDS)]
    assert len(cached(tmp_path)) == 2


def test_the_heads_are_a_small_part_of_what_is_read(tmp_path, write_id_set):
    write_id_set(tmp_path / "ids", [[(90, 18)] * 3000])
    shard = tmp_path / "ids/shard-00000.arrow"

    class Counted:
        def __init__(self):
            self.file, self.bytes, self.closed = shard.open("rb"), 0, False

        def read(self, size=-1):
            data = self.file.read(size)
            self.bytes += len(data)
            return data

        def __getattr__(self, name):
            return getattr(self.file, name)

    counted = Counted()
    assert len(IdShardHead.read(counted, "shard")) == 3000
    assert counted.bytes < shard.stat().st_size / 3


def test_a_shard_is_opened_once_and_fetched_once(ids, open_shards, tmp_path):
    shards = open_shards()
    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(lambda _: shards[2], range(32)))
    assert len({id(shard) for shard in opened}) == 1
    assert downloads(ids) == ["shard-00002.arrow"]
    open_shards()[2]  # another run
    assert downloads(ids) == []
    assert others(tmp_path) == []


@pytest.mark.parametrize("max_open", [1, 3])
def test_the_number_of_open_shards_is_bounded_and_arrays_outlive_it(ids, max_open):
    shards = IdShards(load_manifest(ids), max_open=max_open)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    kept = shards[0].ids[:9]
    expected = kept.tolist()
    for index in [1, 2, 3, 4, 5, 6, 7, 1, 2]:
        assert len(shards[index]) == 20
        assert len(os.listdir("/proc/self/fd")) - before <= max_open + 1  # noqa: PTH208
    assert kept.tolist() == expected


@pytest.mark.parametrize("fault", ["cut", "flip"])
def test_a_fetch_that_goes_wrong_is_tried_again_and_at_last_named(ids, open_shards, tmp_path, fault):
    expected = content(IdShards(load_manifest(ids)), 1)
    steer(ids, faults=2, fault=fault)
    assert content(open_shards(), 1) == expected
    steer(ids, faults=3)
    reason = {"cut": r"\d+ bytes came, \d+ were expected", "flip": "the sha256 of what came differs from manifest.json"}[fault]
    with pytest.raises(
        UserError, match=rf"folderstore://.*/shard-00002\.arrow can't be fetched: after 3 attempts: OSError: {reason}"
    ):
        open_shards()[2]
    assert len(cached(tmp_path)) == 1
    assert others(tmp_path) == []
    assert len(open_shards()[2]) == 20


def test_a_flipped_byte_in_the_store_is_found_when_it_is_fetched(ids, open_shards):
    flip(ids / "shard-00004.arrow")
    shards = open_shards()
    shards.check_sizes()
    assert len(shards[3]) == 20
    with pytest.raises(UserError, match=r"shard-00004\.arrow can't be fetched: .* sha256"):
        shards[4]


def test_a_flipped_byte_on_disk_is_found_by_the_check(ids):
    flip(ids / "shard-00004.arrow")
    shards = IdShards(load_manifest(ids))
    shards.check_sizes()
    with pytest.raises(UserError, match=r"shard-00004\.arrow is damaged \(its sha256 differs"):
        shards.check_digests()


@pytest.mark.parametrize("url", ["{}", "folderstore://{}"])
def test_missing_and_cut_shards_are_named_at_the_start_by_one_listing(ids, url):
    (ids / "shard-00005.arrow").unlink()
    (ids / "shard-00002.arrow").unlink()
    shards = IdShards(load_manifest(url.format(ids)))
    logged(ids)
    with pytest.raises(UserError, match=r"lacks 2 of its 8 shards: shard-00002\.arrow, shard-00005\.arrow; put them back"):
        shards.check_sizes()
    if "://" in url:
        assert [event for event in logged(ids) if event != "info"] == ["ls"]
    for name in ("shard-00005.arrow", "shard-00002.arrow"):
        (ids / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"2 of 8 shards are damaged: shard-00002\.arrow \(0 bytes, manifest\.json says \d+\)"):
        shards.check_sizes()


@pytest.mark.parametrize("url", ["{}", "folderstore://{}"])
def test_all_flaws_of_a_set_are_named(ids, tmp_path, url):
    cache = build(IdCacheConfig, {"folder": str(tmp_path / "cache"), "attempts": 1})
    shards = IdShards(load_manifest(url.format(ids)), cache)
    assert len(shards[3]) == 20
    assert shards.flaws() == {}
    flip(ids / "shard-00003.arrow")  # a good copy is in the cache
    flip(ids / "shard-00004.arrow")
    (ids / "shard-00001.arrow").write_bytes(b"")
    (ids / "shard-00006.arrow").unlink()
    flaws = shards.flaws()
    assert list(flaws) == ["shard-00001.arrow", "shard-00003.arrow", "shard-00004.arrow", "shard-00006.arrow"]
    assert "0 bytes, manifest.json says" in flaws["shard-00001.arrow"]
    assert "sha256" in flaws["shard-00003.arrow"] and "sha256" in flaws["shard-00004.arrow"]
    assert flaws["shard-00006.arrow"] == "is missing"


def test_sound_sets_are_listed_once(ids, open_shards):
    shards = open_shards()
    logged(ids)
    shards.check_sizes()
    shards.check_digests()
    assert logged(ids) == ["ls"]


@pytest.mark.parametrize("url", ["{}", "folderstore://{}"])
def test_a_run_does_not_start_with_a_shard_missing(ids, url):
    (ids / "shard-00005.arrow").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of its 8 shards: shard-00005\.arrow"):
        RowDataset(load_manifest(url.format(ids)), Vocabulary(50, 70), 0, 48, 0, 0.1)


def test_a_shard_that_goes_away_later_is_named(ids, open_shards):
    shards = open_shards()
    (ids / "shard-00006.arrow").unlink()
    with pytest.raises(UserError, match=r"shard-00006\.arrow can't be fetched: FileNotFoundError"):
        shards[6]


def test_prefetched_shards_are_there_when_they_are_asked_for(ids, open_shards, tmp_path):
    steer(ids, seconds=0.05)
    shards = open_shards()
    shards.prefetch([5, 1, 3])
    wait_for(lambda: len(cached(tmp_path)) == 3)
    assert downloads(ids) == [f"shard-0000{index}.arrow" for index in (5, 1, 3)]
    assert [len(shards[index]) for index in (3, 5, 1)] == [20] * 3
    assert downloads(ids) == []
    wait_for(lambda: "id shards" not in {thread.name for thread in threading.enumerate()})


def test_prefetching_takes_no_more_than_half_of_the_room(ids, open_shards, tmp_path):
    shards = open_shards(4)
    assert len(shards[7]) == 20
    shards.prefetch(range(7))
    wait_for(lambda: "id shards" not in {thread.name for thread in threading.enumerate()})
    assert downloads(ids) == [f"shard-0000{index}.arrow" for index in (7, 0, 1)]


def test_a_prefetch_that_fails_is_the_trouble_of_who_needs_the_shard(ids, open_shards):
    shards = open_shards()
    (ids / "shard-00006.arrow").unlink()
    shards.prefetch([6, 2])
    wait_for(lambda: "shard-00002.arrow" in downloads(ids))
    assert len(shards[2]) == 20


def test_training_prefetches_the_next_block_and_its_order_stays(ids, tmp_path):
    cache = build(IdCacheConfig, {"folder": str(tmp_path / "cache")})
    rows = RowDataset(
        load_manifest(f"folderstore://{ids}"), Vocabulary(50, 70), 0, 48, 0, 0.1, id_cache=cache, min_block_documents=20
    )
    GlobalBatches(rows, 1).micro_batches(0, 0, 1, 1)
    wait_for(lambda: len(cached(tmp_path)) == 2)


def test_what_is_no_store_is_refused():
    with pytest.raises(UserError, match=r"nosuch://bucket/ids can't be reached .*check the URL"):
        load_manifest("nosuch://bucket/ids")
    with pytest.raises(UserError, match=r"memory://nothing holds no id set"):
        load_manifest("memory://nothing")
