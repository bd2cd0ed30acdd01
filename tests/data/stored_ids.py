"""What came of a set of ids in a `FolderStore`, for the tests of shards and of their cache."""

import time

from tests.data.folder_store import logged

SHARDS = 8


def cached(tmp_path):
    return sorted((tmp_path / "cache").glob("*.arrow"))


def others(tmp_path):
    """What is in the cache besides whole shards and the lock that is always there."""
    return sorted(path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".arrow" and path.name != ".room.lock")


def content(shards, index):
    return [[(kind, codes.tolist()) for kind, codes in shards[index].segments(d)] for d in range(len(shards[index]))]


def downloads(ids):
    return [event.removeprefix("get ") for event in logged(ids) if event.startswith("get")]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
