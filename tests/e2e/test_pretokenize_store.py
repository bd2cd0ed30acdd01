"""The offline job from and to a store that speaks S3's protocol and fails now and then."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs

from lavit_dist.config.id_cache import IdCacheConfig
from lavit_dist.config.pretokenize import PretokenizeConfig
from lavit_dist.config.ray import DecodingRayConfig
from lavit_dist.data.id_shards import IdShards
from lavit_dist.data.manifest import load_manifest
from pipelines.pretokenize import run
from tests.e2e.s3_store import Unreliable, unreliable_store


@pytest.fixture
def store() -> Iterator[tuple[Unreliable, dict[str, Any]]]:
    """The store, and what fsspec needs to reach it."""
    with unreliable_store() as (application, options):
        yield application, options


def test_the_job_reads_and_writes_a_store_that_fails_now_and_then(
    tiny_world: Path, store: tuple[Unreliable, dict[str, Any]], tmp_path: Path
) -> None:
    application, options = store
    bucket = s3fs.S3FileSystem(**options)
    bucket.mkdir("laion")
    bucket.put(str(tiny_world / "pairs"), "laion/pairs", recursive=True)
    application.on = True
    config = PretokenizeConfig(
        run_dir=str(tmp_path / "run"),
        pairs="s3://laion/pairs",
        output="s3://laion/ids",
        tokenizer=str(tiny_world / "tokenizer"),
        text_tokenizer=str(tiny_world / "language_model"),
        storage_options=options,
        cache_folder=str(tmp_path / "cache"),
        ray=DecodingRayConfig(num_cpus=1, object_store_mb=80),
    )
    run(config)
    assert application.failures > 5
    application.on = False
    for split in ("train", "heldout"):
        manifest = load_manifest(f"s3://laion/ids/{split}", options)
        of_files = load_manifest(tiny_world / "ids" / split)
        assert [shard.sha256 for shard in manifest.shards] == [shard.sha256 for shard in of_files.shards]
        cache = IdCacheConfig(folder=str(tmp_path / "id_cache"), storage_options=options)
        assert IdShards(manifest, cache).flaws() == {}
    assert not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))
    before = bucket.info("laion/ids/train/shard-00000.arrow")["LastModified"]
    run(config)
    bucket.invalidate_cache()
    assert bucket.info("laion/ids/train/shard-00000.arrow")["LastModified"] == before
