"""The offline job as a user runs it: from tars with bad samples in them to id sets, and again after things went wrong."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lavit_dist.checkpoint.official import save_visual_tokenizer, tokenizer_digest
from lavit_dist.config.id_cache import IdCacheConfig
from lavit_dist.config.model import (
    CodebookConfig,
    MergerConfig,
    TokenizerDecoderConfig,
    VisionEncoderConfig,
    VisualTokenizerConfig,
)
from lavit_dist.data.global_batches import GlobalBatches
from lavit_dist.data.id_set_check import find_flaws
from lavit_dist.data.id_shard import IdShard
from lavit_dist.data.manifest import load_manifest
from lavit_dist.data.quarantine import read_quarantine
from lavit_dist.data.rows import RowDataset
from lavit_dist.data.text_tokenizer import TextTokenizer
from lavit_dist.models.initialisation import initialise
from lavit_dist.models.visual_tokenizer import VisualTokenizer
from lavit_dist.models.vocabulary import Vocabulary

SCRIPTS = Path(__file__).parents[2] / "data_prep"
PAIRS_PER_TAR = 6


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPTS / name), *arguments], capture_output=True, text=True, timeout=200, check=False
    )


def write_pairs(path: Path, first: int, extra: dict[str, bytes] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(first)
    members = dict(extra or {})
    for index in range(first, first + PAIRS_PER_TAR):
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (40, 30, 3), np.uint8)).save(buffer, "PNG")
        members |= {f"{index:04d}.png": buffer.getvalue(), f"{index:04d}.txt": f"A noisy picture, number {index}".encode()}
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Three training tars (the second with bad samples), a held-out one cut short, and a random visual tokenizer."""
    work = tmp_path_factory.mktemp("work")
    write_pairs(work / "pairs/train/00000.tar", 0)
    write_pairs(work / "pairs/train/00001.tar", 100, {"web.jpg": b"<html>", "web.txt": b"an error page", "mute.txt": b"no image"})
    write_pairs(work / "pairs/train/00002.tar", 200)
    write_pairs(work / "pairs/heldout/00000.tar", 300)
    cut = work / "pairs/heldout/00000.tar"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    torch.manual_seed(0)
    visual = VisualTokenizer(
        VisualTokenizerConfig(
            encoder=VisionEncoderConfig(image_size=32, patch_size=8, width=32, layers=1, head_width=16, mlp_hidden=32, head_out=16),
            merger=MergerConfig(layers=1, heads=2, mlp_hidden=32),
            codebook=CodebookConfig(size=64, dim=8),
            decoder=TokenizerDecoderConfig(depth=1, heads=2, mlp_hidden=32, unet_dim=16),
        )
    )
    initialise(visual)
    save_visual_tokenizer(visual, work / "tokenizer")
    return work


def settings(work: Path, *more: str) -> list[str]:
    return [
        f"run_dir={work}/ids",
        f"pairs={work}/pairs",
        f"tokenizer={work}/tokenizer",
        f"text_tokenizer={work}/text",
        "inputs_per_shard=1",
        "batch_size=4",
        "ray.object_store_mb=80",
        *more,
    ]


def test_the_job_survives_bad_samples_failures_and_restarts(work):
    trained = run_script("train_text_tokenizer.py", f"run_dir={work}/text", f"pairs={work}/pairs", "vocab_size=300")
    assert trained.returncode == 0, trained.stderr
    (work / "ids/train").mkdir(parents=True)
    obstacle = work / "ids/train/shard-00002.quarantine.jsonl"
    obstacle.mkdir()  # a file can't replace a folder

    first = run_script("pretokenize.py", *settings(work, "ray.num_cpus=2", "ray.num_actors=2", "ray.max_retries=1"))
    assert first.returncode == 1, first.stderr
    assert "train/shard-00002.arrow could not be made: IsADirectoryError" in first.stderr
    assert not (work / "ids/train/manifest.json").exists()
    assert load_manifest(work / "ids/heldout").shards[0].outcomes.damaged_inputs == {"truncated_tar": 1}
    bad = read_quarantine(work / "ids/train/shard-00001.quarantine.jsonl")
    assert {record.key: record.reason for record in bad} == {"web": "web_page", "mute": "missing_image"}
    made = {path: path.read_bytes() for path in sorted(work.glob("ids/*/shard-*")) if path.is_file()}

    obstacle.rmdir()
    (work / "ids/train/shard-00000.arrow").unlink()
    untouched = work / "ids/train/shard-00001.arrow"
    stamp = untouched.stat().st_mtime_ns
    second = run_script("pretokenize.py", *settings(work, "ray.num_cpus=1", "ray.num_actors=1"))
    assert second.returncode == 0, second.stderr
    assert "2 of 4 shards are done already" in second.stderr
    assert {path: path.read_bytes() for path in made} == made  # whatever the number of actors
    assert untouched.stat().st_mtime_ns == stamp
    assert load_manifest(work / "ids/train").encoding.visual_tokenizer == tokenizer_digest(work / "tokenizer")
    assert [shard.documents for shard in load_manifest(work / "ids/train").shards] == [6, 6, 6]

    # No cluster is at this address: a job that is done starts no Ray.
    third = run_script("pretokenize.py", *settings(work), "--ray-address", "127.0.0.1:1")
    assert third.returncode == 0, third.stderr
    assert "4 of 4 shards are done already" in third.stderr
    assert {path: path.read_bytes() for path in made} == made
    check_that_rows_can_be_made(work)
    assert [find_flaws(load_manifest(work / "ids" / split), IdCacheConfig()) for split in ("train", "heldout")] == [[], []]

    changed = run_script("pretokenize.py", *settings(work, "seed=7"))
    assert changed.returncode == 2
    assert "belongs to a run with seed = 0, but now seed = 7" in changed.stderr


def check_that_rows_can_be_made(work: Path) -> None:
    manifest = load_manifest(work / "ids/train")
    text = TextTokenizer.load(work / "text")
    manifest.check_tokenizers(visual_tokenizer=tokenizer_digest(work / "tokenizer"), text_tokenizer=text.digest)
    rows = RowDataset(load_manifest(work / "ids/train"), Vocabulary(text.vocab_size, 64), text.eos_id, 128, 0, 0.1)
    assert rows.num_documents == 18
    assert GlobalBatches(rows, 2).micro_batches(0, 0, 1, 2)[0].tokens.shape == (2, 128)
    shard = IdShard(work / "ids/train/shard-00000.arrow")
    assert [text.decode(shard.segments(index)[1][1]) for index in range(6)] == [
        caption.lower() for caption in shard.column("caption")
    ]


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("tokenizer={}/nowhere", "nowhere holds no visual tokenizer"),
        ("pairs={}/nowhere", "nowhere does not exist and so holds no *.tar files"),
        ("pairs=[{0}/pairs/train,{0}/absent.tar]", "pairs names 1 tars that do not exist, such as"),
    ],
)
def test_mistakes_end_in_one_sentence_before_anything_is_started(work, setting, sentence):
    result = run_script("pretokenize.py", *settings(work, f"run_dir={work}/new", setting.format(work)))
    assert result.returncode == 2
    assert sentence in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (work / "new").exists()
