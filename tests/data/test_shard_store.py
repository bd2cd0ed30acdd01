"""Remote tars: fetched whole, tried again, kept within a budget, and nothing is left behind."""

import gc
import io
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from lavit_dist.config.base import build
from lavit_dist.config.images import ImagesConfig
from lavit_dist.data.image_batches import open_images
from lavit_dist.data.quarantine import SampleError
from lavit_dist.data.shard_list import list_tars
from lavit_dist.data.shard_store import ShardStore
from lavit_dist.errors import UserError

TARS = 6


class Unreliable(MemoryFileSystem):
    """An fsspec file system in memory of which the next `failures` downloads fail, or end early."""

    protocol = "unreliable"
    store: ClassVar[dict] = {}
    failures = 0
    downloads = 0
    cut = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("unreliable://"))

    def get_file(self, rpath, lpath, **options):
        type(self).downloads += 1
        if self.failures:
            type(self).failures -= 1
            if not self.cut:
                raise ConnectionResetError("reset by peer")
            Path(lpath).write_bytes(self.cat_file(rpath)[:700])
            return
        super().get_file(rpath, lpath, **options)


@pytest.fixture
def remote(jpeg):
    """A store of tars of two pictures."""
    fsspec.register_implementation("unreliable", Unreliable, clobber=True)
    system = fsspec.filesystem("unreliable")
    for number in range(TARS):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for key in range(2):
                data = jpeg((number * 40, key * 90, 0))
                info = tarfile.TarInfo(f"{key}.jpg")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        system.pipe(f"/laion/{number}.tar", buffer.getvalue())
    Unreliable.failures = Unreliable.downloads = 0
    Unreliable.cut = False
    yield system
    system.store.clear()


@pytest.fixture
def open_store(tmp_path):
    """`open_store(tars)`: a store with room for so many tars."""

    def make(room=TARS, at_hand=2, attempts=3):
        shards = list_tars("unreliable://laion/*.tar", {}, "images.shards")
        size = max(shard.size for shard in shards)
        return ShardStore(
            shards,
            cache_folder=str(tmp_path / "cache"),
            cache_bytes=room * size,
            attempts=attempts,
            open_at_a_time=at_hand,
            first_wait=0.001,
        )

    return make


def fetched(tmp_path):
    return sorted((tmp_path / "cache").glob("*/*.tar"))


def test_a_tar_is_fetched_once_and_shared(remote, open_store):
    store = open_store()
    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(lambda _: store.open(2), range(16)))
    assert len({id(shard) for shard in opened}) == 1
    assert [sample.key for sample in opened[0].samples] == ["0", "1"]
    assert Unreliable.downloads == 1
    del opened
    store.open(2)
    assert Unreliable.downloads == 1  # still on disk


@pytest.mark.parametrize("cut", [False, True])
def test_a_download_that_fails_or_ends_early_is_tried_again(remote, open_store, tmp_path, cut):
    store = open_store()
    Unreliable.failures, Unreliable.cut = 2, cut
    assert len(store.open(0).samples) == 2
    Unreliable.failures = 3
    with pytest.raises(SampleError, match=r"unfetched_tar: .*1\.tar after 3 attempts"):
        store.open(1)
    assert len(fetched(tmp_path)) == 1
    assert len(store.open(1).samples) == 2  # what failed once may be there in the next epoch


def test_a_tar_that_was_removed_is_missing_at_once(remote, open_store):
    store = open_store()
    remote.rm("/laion/3.tar")
    with pytest.raises(SampleError, match="missing_tar"):
        store.open(3)
    assert Unreliable.downloads == 1


def test_the_budget_holds_and_tars_in_use_stay_readable(remote, open_store, tmp_path):
    store = open_store(room=3)
    in_use = store.open(0)
    for number in [1, 2, 3, 4, 5, 1, 2]:
        shard = store.open(number)
        assert shard.samples
        assert len(fetched(tmp_path)) <= 3
        del shard
        gc.collect()
    before = Unreliable.downloads
    assert in_use.read(in_use.samples[0].image)
    assert store.open(0) is in_use
    assert store.open(2).samples
    assert Unreliable.downloads == before


def test_too_small_a_budget_is_refused(remote, open_store):
    with pytest.raises(UserError, match=r"images\.cache_bytes \d+ can't hold the 2 tars .* raise it, or lower images\.streams"):
        open_store(room=1)


def test_what_a_process_leaves_goes_with_it_and_what_a_killed_one_left_goes_with_the_next(remote, open_store, tmp_path):
    program = """
import os, sys
import fsspec
from lavit_dist.data.shard_list import Shard
from lavit_dist.data.shard_store import ShardStore
system = fsspec.filesystem("memory")
system.pipe("/0.tar", bytes(1024))
store = ShardStore([Shard("0.tar", "/0.tar", 1024, system)], cache_folder=sys.argv[1], cache_bytes=9999, attempts=1, open_at_a_time=2)
store.open(0)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), 9)
"""
    for end, left in (("well", 0), ("killed", 1)):
        subprocess.run([sys.executable, "-c", program, str(tmp_path / "cache"), end], check=end == "well", timeout=60)
        assert len(fetched(tmp_path)) == left
    first, second = open_store(), open_store()
    assert len(list((tmp_path / "cache").glob("*.lock"))) == 2
    first.open(0), second.open(0)
    assert len(fetched(tmp_path)) == 2
    del first, second
    gc.collect()
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("streams", [2, 4, 8])
def test_batches_of_remote_tars_are_those_of_the_same_tars_on_disk(remote, tmp_path, streams):
    remote.get("/laion", str(tmp_path / "laion"), recursive=True)
    keys = []
    for shards in (str(tmp_path / "laion"), "unreliable://laion/{0..5}.tar"):
        config = build(ImagesConfig, {"shards": shards, "order": "streamed", "streams": streams, "fetch_attempts": 2})
        batches = open_images(config, image_size=8, global_batch_size=8, seed=0, rank=0, world_size=1)
        keys.append([batches.next().keys for _ in range(10)])
        batches.close()
    assert keys[0] == keys[1]


def test_an_unreliable_store_costs_tars_and_never_the_run(remote):
    config = build(ImagesConfig, {"shards": "unreliable://laion/*.tar", "order": "streamed", "streams": 2, "fetch_attempts": 1})
    ranks = [open_images(config, image_size=8, global_batch_size=4, seed=0, rank=rank, world_size=2) for rank in range(2)]
    Unreliable.failures = 4
    for _ in range(12):
        for batches in ranks:
            assert len(batches.next().keys) == 2
    assert {record.reason for batches in ranks for record in batches.quarantined.values()} == {"unfetched_tar"}
    for batches in ranks:
        batches.close()
    assert threading.active_count() < 20
