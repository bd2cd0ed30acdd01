"""Remembered features: the same whether they come out of the cache or not, within the budget, and never of another tower."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lavit_dist.engine.feature_cache import FeatureCache
from lavit_dist.errors import UserError

PATCHES, WIDTH = 4, 6
RECORD = PATCHES * WIDTH * 4
ENTRY = 24


class Tower:
    """Features that are told apart by the pixels, and which keys had to be seen."""

    def __init__(self):
        self.seen = []

    def __call__(self, keys, pixel_values):
        self.seen += keys
        return features_of(pixel_values)


def features_of(pixel_values):
    return pixel_values.flatten(1)[:, : PATCHES * WIDTH].reshape(-1, PATCHES, WIDTH) / 3


def pixels(keys):
    return torch.stack([torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(int(key))) for key in keys])


def open_cache(tower=None, *, memory_bytes=0, disk_bytes=0, folder=None, digest="tower", dtype=torch.float32):
    return FeatureCache(
        tower or Tower(), memory_bytes=memory_bytes, disk_bytes=disk_bytes, folder=folder, digest=digest, dtype=dtype
    )


def disk_use(folder):
    return sum((folder / name).stat().st_size for name in ("features", "index"))


@given(
    batches=st.lists(st.lists(st.integers(0, 12).map(str), min_size=1, max_size=6), min_size=1, max_size=10),
    memory=st.integers(0, 14),
    disk=st.integers(0, 14),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_features_are_those_of_the_tower_whatever_the_budgets(tmp_path_factory, batches, memory, disk, dtype):
    folder = tmp_path_factory.mktemp("cache") if disk else None
    record = RECORD * dtype.itemsize // 4
    cache = open_cache(memory_bytes=memory * record, disk_bytes=disk * (record + ENTRY), folder=folder, dtype=dtype)
    for keys in batches:
        found = cache(keys, pixels(keys))
        assert found.dtype == torch.float32
        assert torch.equal(found, features_of(pixels(keys)).to(dtype).float())
    assert cache.hits + len(cache.encode.seen) == sum(map(len, batches))
    if max(memory, disk) >= 13:  # everything fits
        assert len(cache.encode.seen) == sum(len([key for key in keys if key not in before]) for keys, before in with_seen(batches))
    if folder is not None:
        assert disk_use(folder) <= disk * (record + ENTRY)


def with_seen(batches):
    """Each batch with the keys of the batches before it."""
    seen = set()
    for keys in batches:
        yield keys, set(seen)
        seen.update(keys)


def test_a_later_process_and_another_rank_find_what_one_has_stored(tmp_path):
    keys = [str(n) for n in range(10)]
    first, beside = (open_cache(disk_bytes=1 << 20, folder=tmp_path) for _ in range(2))
    expected = first(keys[:6], pixels(keys[:6]))
    assert torch.equal(beside(keys[:6], pixels(keys[:6])), expected)
    beside(keys[6:], pixels(keys[6:]))
    assert beside.encode.seen == keys[6:]
    first(keys, pixels(keys))
    assert first.encode.seen == keys[:6]
    later = open_cache(memory_bytes=1 << 20, disk_bytes=1 << 20, folder=tmp_path)
    for _ in range(2):
        later(keys, torch.zeros(10, 3, 8, 8))  # the pixels of remembered images are not looked at
    assert later.encode.seen == []
    assert later.hits == 20
    assert disk_use(tmp_path) == 10 * (RECORD + ENTRY)


def test_a_record_without_a_whole_entry_is_written_over(tmp_path):
    """What a kill leaves: a record, whole or not, of which the index tells nothing or only the beginning."""
    open_cache(disk_bytes=1 << 20, folder=tmp_path)(["0", "1", "2"], pixels("012"))
    for cut in (1, ENTRY // 2, ENTRY - 1):
        index = tmp_path / "index"
        index.write_bytes(index.read_bytes()[:-cut])
        cache = open_cache(disk_bytes=1 << 20, folder=tmp_path)
        assert torch.equal(cache(["0", "1", "2"], pixels("012")), features_of(pixels("012")))
        assert cache.encode.seen == ["2"]
        assert disk_use(tmp_path) == 3 * (RECORD + ENTRY)


@pytest.mark.parametrize("name", ["features", "index"])
@given(place=st.integers(0, 3 * ENTRY - 1), value=st.integers(1, 255))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_bytes_are_noticed_and_made_anew(tmp_path_factory, name, place, value):
    folder = tmp_path_factory.mktemp("cache")
    open_cache(disk_bytes=1 << 20, folder=folder)(["0", "1", "2"], pixels("012"))
    data = bytearray((folder / name).read_bytes())
    data[place] ^= value
    (folder / name).write_bytes(data)
    for misses in (1, 0):  # and the new record is found next time
        cache = open_cache(disk_bytes=1 << 20, folder=folder)
        assert torch.equal(cache(["0", "1", "2"], pixels("012")), features_of(pixels("012")))
        assert len(cache.encode.seen) == misses


WRITER = """
import sys
import torch
from lavit_dist.engine.feature_cache import FeatureCache
def encode(keys, pixel_values):
    return torch.stack([torch.full((64, 64), float(key)) for key in keys])
cache = FeatureCache(encode, memory_bytes=0, disk_bytes=1 << 24, folder=sys.argv[1], digest="tower")
print("ready", flush=True)
for start in range(int(sys.argv[2]), int(sys.argv[3]), 4):
    cache([str(key) for key in range(start, start + 4)], torch.zeros(4, 3, 8, 8))
"""


def test_processes_killed_while_they_write_together_leave_nothing_wrong(tmp_path):
    starts = (0, 500)
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(start), "1000000"], stdout=subprocess.PIPE)
        for start in starts
    ]
    for writer in writers:
        assert writer.stdout.readline() == b"ready\n"
    time.sleep(0.3)
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
    cache = FeatureCache(
        lambda keys, values: torch.stack([torch.full((64, 64), float(key)) for key in keys]),
        memory_bytes=0,
        disk_bytes=1 << 24,
        folder=tmp_path,
        digest="tower",
    )
    keys = [str(key) for key in range(1000)]
    found = cache(keys, torch.zeros(1000, 3, 8, 8))
    assert torch.equal(found, torch.arange(1000.0)[:, None, None].expand_as(found))
    assert cache.hits > 8
    assert disk_use(tmp_path) <= 1 << 24


def test_a_folder_of_another_tower_type_or_shape_is_refused(tmp_path):
    open_cache(disk_bytes=1 << 20, folder=tmp_path)(["0"], pixels("0"))
    with pytest.raises(UserError, match=r"was made with digest 'tower', and now digest is 'other'.* remove that folder"):
        open_cache(disk_bytes=1 << 20, folder=tmp_path, digest="other")
    with pytest.raises(UserError, match="made with dtype 'float32', and now dtype is 'bfloat16'"):
        open_cache(disk_bytes=1 << 20, folder=tmp_path, dtype=torch.bfloat16)
    cache = open_cache(lambda keys, values: torch.zeros(len(keys), 2, 2), disk_bytes=1 << 20, folder=tmp_path)
    with pytest.raises(UserError, match=r"holds features of shape \[4, 6\], and the tower makes \[2, 2\]"):
        cache(["1"], pixels("1"))
    for half in ({"disk_bytes": 5}, {"folder": tmp_path}):
        with pytest.raises(UserError, match="give both, or neither"):
            open_cache(**half)
    with pytest.raises(UserError, match="can't be written"):
        open_cache(disk_bytes=1, folder=tmp_path / "features" / "below_a_file")


def test_memory_holds_copies_and_no_whole_batches():
    cache = open_cache(memory_bytes=RECORD)
    keys = [str(n) for n in range(50)]
    cache(keys, pixels(keys))
    (kept,) = cache._memory.values()
    assert kept.untyped_storage().nbytes() == RECORD
