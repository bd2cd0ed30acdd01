"""What tests of several parts share, and the settings of all tests."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from lavit_dist.data.id_shard import IMAGE, TEXT, Encoding, IdDocument, write_id_shard
from lavit_dist.data.manifest import Manifest, write_manifest

# Tests take turns on few cores; threads of one test would only wait for those of another. Child processes inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Properties are tried on a fixed number of cases, without a clock (the machine may be busy).
settings.register_profile("lavit_dist", deadline=None, max_examples=30)
settings.load_profile("lavit_dist")


@pytest.fixture(scope="session")
def write_id_set() -> Callable[..., Manifest]:
    """`write_id_set(folder, shards)`: an id set of pairs with random ids; `shards` holds (codes, text ids) of each document, per shard."""

    def write(
        folder: Path,
        shards: Sequence[Sequence[tuple[int, int]]],
        *,
        text_vocab_size: int = 50,
        codebook_size: int = 70,
        visual_tokenizer: str = "visual",
        text_tokenizer: str = "text",
    ) -> Manifest:
        encoding = Encoding(visual_tokenizer, text_tokenizer, "preprocessing", "settings", text_vocab_size, codebook_size)
        random = np.random.default_rng(0)
        records = []
        for number, lengths in enumerate(shards):
            documents = [
                IdDocument(
                    key=f"{number}-{index}",
                    caption_index=0,
                    segments=(
                        (IMAGE, random.integers(codebook_size, size=codes)),
                        (TEXT, random.integers(text_vocab_size, size=text)),
                    ),
                    keep_mask=b"\xf0",
                    caption="a red circle",
                    source=("00000.tar", 512 * index, 100),
                )
                for index, (codes, text) in enumerate(lengths)
            ]
            path = folder / f"shard-{number:05d}.arrow"
            records.append(write_id_shard(path, documents, encoding=encoding, inputs=(), quarantined={}))
        return write_manifest(folder, records)

    return write


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The folder of setup.py, where entry points are run."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def photos(repo_root: Path) -> Path:
    """The captions file of the 51 photographs that come beside the repository."""
    path = repo_root.parent / "shared" / "data" / "photos" / "captions.jsonl"
    if not path.exists():
        pytest.fail(f"{path} is missing: these tests need the photographs of shared/data beside the repository")
    return path
