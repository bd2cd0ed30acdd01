"""The cache of fetched shards keeps its promises to several processes, through kills and damage."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lavit_dist.data.id_shards import IdShards
from lavit_dist.data.manifest import load_manifest
from lavit_dist.errors import UserError
from tests.data.folder_store import steer
from tests.data.stored_ids import SHARDS, cached, content, downloads, flip, others, wait_for

REPOSITORY = Path(__file__).parents[2]

PROGRAM = """
import sys
from lavit_dist.config.base import build
from lavit_dist.config.id_cache import IdCacheConfig
from lavit_dist.data.id_shards import IdShards
from lavit_dist.data.manifest import load_manifest
import tests.data.folder_store
ids, folder, size, *indices = sys.argv[1:]
shards = IdShards(load_manifest("folderstore://" + ids), build(IdCacheConfig, {"folder": folder, "bytes": int(size)}))
print("ready", flush=True)
sys.stdin.readline()
for index in indices:
    print(shards[int(index)].ids.sum(), flush=True)
sys.stdin.readline()
"""


class Reader:
    """A process that opens shards when it is told to, and ends when it is told to."""

    def __init__(self, ids, tmp_path, size, *indices):
        arguments = [sys.executable, "-c", PROGRAM, ids, tmp_path / "cache", size, *indices]
        self.indices = indices
        self.process = subprocess.Popen(
            list(map(str, arguments)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
        )
        assert self.process.stdout.readline() == "ready\n"

    def go(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def sums(self):
        return [int(self.process.stdout.readline()) for _ in self.indices]

    def end(self):
        self.process.communicate("\n", timeout=60)
        assert self.process.returncode == 0

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate(timeout=60)


@pytest.mark.parametrize("room", [2, 4])
def test_the_room_is_kept_and_the_least_recently_used_shard_goes(ids, open_shards, tmp_path, room):
    shards = open_shards(room)
    for index in range(SHARDS):
        assert len(shards[index]) == 20
        assert len(cached(tmp_path)) <= room
    downloads(ids)
    del shards
    gc.collect()
    again = open_shards(room)
    oldest = SHARDS - room
    assert len(again[oldest]) == 20  # it is there still, and now the most recently used
    assert len(again[0]) == 20
    assert len(again[oldest]) == 20
    assert downloads(ids) == ["shard-00000.arrow"]
    names = {path.name.split(".")[0] for path in cached(tmp_path)}
    digests = [record.sha256 for record in again.manifest.shards]
    assert digests[oldest] in names and digests[0] in names
    assert digests[oldest + 1] not in names


def test_what_another_process_reads_is_never_removed(ids, open_shards, tmp_path):
    size = (ids / "shard-00000.arrow").stat().st_size
    reader = Reader(ids, tmp_path, 4 * size, 0)
    reader.go()
    reader.sums()
    shards = open_shards(4)
    first = tmp_path / "cache" / f"{shards.manifest.shards[0].sha256}.{size}.arrow"
    os.utime(first, (0, 0))  # the oldest by far
    for index in range(1, SHARDS):
        assert len(shards[index]) == 20
        assert first.exists()
        assert len(cached(tmp_path)) <= 4
    reader.end()
    for index in range(1, 5):
        assert len(shards[index]) == 20
    assert not first.exists()


def test_a_killed_reader_holds_nothing(ids, open_shards, tmp_path):
    size = (ids / "shard-00000.arrow").stat().st_size
    reader = Reader(ids, tmp_path, 2 * size, 0)
    reader.go()
    reader.sums()
    reader.kill()
    shards = open_shards(2)
    for index in range(1, 4):
        assert len(shards[index]) == 20
        assert len(cached(tmp_path)) <= 2


def test_processes_that_want_a_shard_at_once_fetch_it_once(ids, tmp_path):
    steer(ids, seconds=0.5)
    size = (ids / "shard-00000.arrow").stat().st_size
    readers = [Reader(ids, tmp_path, SHARDS * size, 0, 1, 2) for _ in range(2)]
    for reader in readers:
        reader.go()
    assert len({tuple(reader.sums()) for reader in readers}) == 1
    for reader in readers:
        reader.end()
    assert sorted(downloads(ids)) == ["shard-00000.arrow", "shard-00001.arrow", "shard-00002.arrow"]
    assert others(tmp_path) == []


def test_a_fetch_that_was_killed_is_made_by_who_waits_and_leaves_nothing(ids, open_shards, tmp_path):
    steer(ids, seconds=60)
    size = (ids / "shard-00000.arrow").stat().st_size
    first, second = (Reader(ids, tmp_path, SHARDS * size, 0) for _ in range(2))
    first.go()
    wait_for(lambda: any(name.endswith(".tmp") for name in others(tmp_path)))
    second.go()
    time.sleep(0.2)  # it waits for the lock by now, or soon; either way it comes second
    steer(ids, seconds=0)
    first.kill()
    assert second.sums() == [int(IdShards(load_manifest(ids))[0].ids.sum())]
    second.end()
    assert downloads(ids) == ["shard-00000.arrow"] * 2
    assert others(tmp_path) == []


def test_what_a_killed_fetch_left_goes_at_the_next_start(ids, open_shards, tmp_path):
    steer(ids, seconds=60)
    reader = Reader(ids, tmp_path, SHARDS * (ids / "shard-00000.arrow").stat().st_size, 0)
    reader.go()
    wait_for(lambda: any(name.endswith(".tmp") for name in others(tmp_path)))
    open_shards()
    assert len(others(tmp_path)) == 2  # a fetch that goes on keeps its file and its lock
    reader.kill()
    assert len(others(tmp_path)) == 2
    (tmp_path / "cache/of the user.tmp").touch()
    open_shards()
    assert others(tmp_path) == ["of the user.tmp"]
    assert cached(tmp_path) == []


def test_a_truncated_copy_is_noticed_and_fetched_again(ids, open_shards, tmp_path):
    expected = content(open_shards(), 3)
    gc.collect()
    (path,) = cached(tmp_path)
    os.truncate(path, path.stat().st_size // 2)
    downloads(ids)
    assert content(open_shards(), 3) == expected
    assert downloads(ids) == ["shard-00003.arrow"]


def test_a_flipped_byte_in_the_cache_is_found_by_the_check_and_fetched_again(ids, open_shards, tmp_path):
    expected = content(open_shards(), 3)
    gc.collect()
    (path,) = cached(tmp_path)
    flip(path)
    downloads(ids)
    shards = open_shards()
    shards.check_digests()
    assert cached(tmp_path) == []
    assert content(shards, 3) == expected
    assert downloads(ids) == ["shard-00003.arrow"]


def test_too_small_a_cache_is_refused(open_shards):
    with pytest.raises(UserError, match=r"id_cache\.bytes \d+ can't hold two shards .* raise it to \d+ or more"):
        open_shards(1)


def test_a_cache_that_can_not_be_written_is_refused(open_shards, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"id_cache\.folder .*/cache can't be written"):
        open_shards()
