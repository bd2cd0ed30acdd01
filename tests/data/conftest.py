"""Pictures, tars and id sets, good and bad, for the tests of the data part."""

import zlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import pytest

from lavit_dist.config.base import build
from lavit_dist.config.id_cache import IdCacheConfig
from lavit_dist.data.id_shard import Encoding, IdDocument
from lavit_dist.data.id_shard_writer import write_id_shard
from lavit_dist.data.id_shards import IdShards
from lavit_dist.data.manifest import Manifest, load_manifest, write_manifest
from tests.conftest import Members
from tests.data.stored_ids import SHARDS


@pytest.fixture
def write_images(write_tar: Callable[[Members, str], Path], jpeg: Callable[..., bytes]) -> Callable[..., Path]:
    """`write_images(name, count, bad)`: a tar of `count` pictures without captions, those numbered in `bad` no pictures at all."""

    def write(name: str, count: int, bad: Collection[int] = ()) -> Path:
        shade = zlib.crc32(name.encode()) % 200
        return write_tar(
            [(f"{n:03d}.jpg", b"<html>" if n in bad else jpeg((shade, n * 9 % 256, n), (12, 8))) for n in range(count)], name
        )

    return write


@pytest.fixture(scope="session")
def write_documents() -> Callable[..., Manifest]:
    """`write_documents(folder, shards)`: an id set of the documents that each entry of `shards` lists, of 50 text ids and 70 codes."""

    def write(folder: Path, shards: Sequence[Sequence[IdDocument]]) -> Manifest:
        encoding = Encoding("visual", "text", "preprocessing", "settings", 50, 70)
        folder.mkdir(exist_ok=True)
        paths = [folder / f"shard-{number:05d}.arrow" for number in range(len(shards))]
        return write_manifest(
            folder,
            [write_id_shard(path, documents, encoding=encoding, inputs=()) for path, documents in zip(paths, shards, strict=True)],
        )

    return write


@pytest.fixture
def ids(tmp_path: Path, write_id_set: Callable[..., Manifest]) -> Path:
    """The local folder of a set of shards of the same size."""
    write_id_set(tmp_path / "ids", [[(9, 4)] * 20 for _ in range(SHARDS)])
    return tmp_path / "ids"


@pytest.fixture
def open_shards(ids: Path, tmp_path: Path) -> Callable[..., IdShards]:
    """`open_shards(room)`: the set through a cache with room for so many shards."""

    def make(room: int = SHARDS, attempts: int = 3, **settings: int) -> IdShards:
        manifest = load_manifest(f"folderstore://{ids}")
        cache = {"folder": str(tmp_path / "cache"), "bytes": room * manifest.shards[0].size, "attempts": attempts}
        return IdShards(manifest, build(IdCacheConfig, cache), first_wait=0.001, **settings)

    return make
