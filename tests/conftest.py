"""What tests of several parts share, and the settings of all tests."""

import io
import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from lavit_dist.data.id_shard import IMAGE, TEXT, Encoding, IdDocument
from lavit_dist.data.id_shard_writer import write_id_shard
from lavit_dist.data.manifest import Manifest, write_manifest
from lavit_dist.data.text_tokenizer import train_text_tokenizer

# Tests take turns on few cores; threads of one test would only wait for those of another. Child processes inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Properties are tried on a fixed number of cases, without a clock (the machine may be busy).
settings.register_profile("lavit_dist", deadline=None, max_examples=30)
settings.load_profile("lavit_dist")


Members = Iterable[tuple[str, bytes]]


@pytest.fixture(scope="session")
def jpeg() -> Callable[..., bytes]:
    """`jpeg(colour, size)`: the bytes of a picture of one colour."""

    def make(colour: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (24, 16), kind: str = "JPEG") -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", size, colour).save(buffer, kind)
        return buffer.getvalue()

    return make


@pytest.fixture
def write_tar(tmp_path: Path) -> Callable[[Members, str], Path]:
    """`write_tar(members, name)`: a tar of the members as they come, doubled names and all."""

    def write(members: Members, name: str = "00000.tar") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write


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
            records.append(write_id_shard(path, documents, encoding=encoding, inputs=()))
        return write_manifest(folder, records)

    return write


@pytest.fixture(scope="session")
def pretrain_settings(write_id_set: Callable[..., Manifest], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a small pretraining run, with a text tokenizer and an id set to train on."""
    folder = tmp_path_factory.mktemp("pretrain")
    text_tokenizer = train_text_tokenizer(["a red circle on the left of a blue square"], 300, folder / "text_tokenizer")
    lengths = np.random.default_rng(1).integers((8, 4), (30, 20), size=(400, 2)).tolist()
    write_id_set(
        folder / "ids",
        [lengths[:250], lengths[250:]],
        text_vocab_size=text_tokenizer.vocab_size,
        text_tokenizer=text_tokenizer.digest,
    )
    return {
        "ids": str(folder / "ids"),
        "text_tokenizer": str(folder / "text_tokenizer"),
        "plan_cache": str(folder / "plans"),
        "model": {
            "hidden_size": 64,
            "num_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "ffn_hidden_size": 128,
            "max_position_embeddings": 128,
        },
        "optimizer": {"learning_rate": 2e-3, "warmup_steps": 3, "gradient_clipping": 0.8},
        "precision": "fp32",
        "seq_len": 128,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "num_threads": 1,
    }


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


@pytest.fixture(scope="session")
def reference(repo_root: Path) -> Path:
    """The folder of reference vectors of the released modules that comes beside the repository."""
    path = repo_root.parent / "shared" / "reference" / "lavit_tiny"
    if not path.exists():
        pytest.fail(f"{path} is missing: these tests need the vectors of shared/reference beside the repository")
    return path
