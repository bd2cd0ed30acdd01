"""data_prep/cache_latents.py as a user starts it, and decoder training on what it makes."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from lavit_dist.checkpoint.official import load_visual_tokenizer
from lavit_dist.checkpoint.pixel_decoding import load_pixel_decoder
from lavit_dist.config.base import load_config
from lavit_dist.config.decoder import TrainDecoderConfig
from lavit_dist.config.id_cache import IdCacheConfig
from lavit_dist.data.id_set_check import find_flaws
from lavit_dist.data.id_shards import IdShards
from lavit_dist.data.latent_set import LatentBatches
from lavit_dist.data.manifest import load_manifest, write_manifest
from lavit_dist.data.reshard import reshard
from lavit_dist.engine.decoder_examples import ExamplesFromLatents, ExamplesFromPairs
from lavit_dist.errors import UserError
from lavit_dist.observe.metrics import METRICS_FILE, read_lines
from pipelines.train_decoder import build_latents, open_examples

VAE = ("model.latent=vae", "model.latent_factor=2", "model.latent_channels=4", "model.concatenate_condition=false")


def program(root: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, name, *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=200, check=False)


def make_vae(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, scaling_factor=0.5, **blocks).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def latents(tiny_world: Path, repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that kept the latents of the tiny world's pairs; the autoencoder lies beside it."""
    root = tmp_path_factory.mktemp("latents")
    result = program(
        repo_root,
        "data_prep/cache_latents.py",
        f"run_dir={root / 'set'}",
        f"pairs={tiny_world / 'pairs'}",
        f"tokenizer={tiny_world / 'tokenizer'}",
        f"vae={make_vae(root / 'vae')}",
        "image_size=40",
        "batch_size=7",
        "ray.num_actors=1",
    )
    assert result.returncode == 0, result.stderr
    return root / "set"


@pytest.fixture
def settings(latents: Path, decoder_config: Path, tmp_path: Path) -> tuple[str, ...]:
    """Settings of a training on these latents."""
    vae = latents.parent / "vae"
    run = (f"run_dir={tmp_path / 'run'}", "image_size=40", f"model.vae={vae}", "total_steps=4", "checkpoint.every_steps=2")
    return (*run, *VAE, "pairs=null", f"latents={latents / 'train'}")


def test_the_examples_are_those_that_pairs_give(latents, settings, decoder_config, tiny_world):
    from_pairs = load_config(
        TrainDecoderConfig,
        decoder_config,
        (*settings, "latents=null", f"pairs={tiny_world / 'pairs/train'}", "global_batch_size=60"),
    )
    from_latents = load_config(TrainDecoderConfig, decoder_config, (*settings, "global_batch_size=60"))
    tokenizer = load_visual_tokenizer(from_pairs.tokenizer).requires_grad_(False).eval()
    pairs = open_examples(from_pairs, build_latents(from_pairs), tokenizer)()
    kept = open_examples(from_latents, build_latents(from_latents), tokenizer)()
    assert isinstance(pairs, ExamplesFromPairs)
    assert isinstance(kept, ExamplesFromLatents)
    keys = IdShards(load_manifest(latents / "train"))[0].column("key")
    order = [keys.index(key) for key in pairs.batches.batch(0).keys]
    places = {index: place for place, index in enumerate(kept.batches.batch(0).indices)}
    theirs, ours = pairs.batch(0), kept.batch(0)
    taken = [places[index] for index in order]
    assert sorted(taken) == list(range(60))
    torch.testing.assert_close(ours.clean[taken], theirs.clean, rtol=2**-10, atol=1e-6)  # fp16
    torch.testing.assert_close(ours.features[taken], theirs.features, rtol=1e-4, atol=1e-5)


def test_the_set_is_sound_and_keeps_its_latents_in_other_shards(latents, tmp_path):
    manifest = load_manifest(latents / "train")
    assert find_flaws(manifest, IdCacheConfig()) == []
    assert manifest.encoding.latents is not None
    assert manifest.encoding.latents.shape == (4, 20, 20)
    cut = IdShards(reshard(manifest, tmp_path / "cut", num_shards=3))
    whole = np.concatenate([shard.latents for shard in IdShards(manifest)])
    assert np.array_equal(np.concatenate([shard.latents for shard in cut]), whole)
    joined = reshard(cut.manifest, tmp_path / "joined", num_shards=len(manifest.shards))
    assert [shard.sha256 for shard in joined.shards] == [shard.sha256 for shard in manifest.shards]


@pytest.mark.parametrize("num_shards", [1, 4])
def test_every_image_comes_once_an_epoch_for_any_number_of_ranks(latents, tmp_path, num_shards):
    manifest = reshard(load_manifest(latents / "train"), tmp_path / "cut", num_shards=num_shards)
    alone = LatentBatches(IdShards(manifest), 12, seed=5)
    batches = [alone.batch(step).indices for step in range(10)]
    for epoch in (batches[:5], batches[5:]):
        assert sorted(index for batch in epoch for index in batch) == list(range(60))
    assert batches[:5] != batches[5:]
    for ranks in (2, 3, 4):
        shares = [LatentBatches(IdShards(manifest), 12, 5, rank, ranks).batch(3).indices for rank in range(ranks)]
        assert [share[place] for place in range(12 // ranks) for share in shares] == batches[3]


def test_training_resumes_bit_for_bit_and_refuses_another_set(latents, settings, decoder_config, repo_root, tmp_path):
    train = ("launcher/train_decoder.py", "--config", str(decoder_config), *settings)
    result = program(repo_root, *train)
    assert result.returncode == 0, result.stderr
    straight = load_pixel_decoder(tmp_path / "run/model").decoder.state_dict()
    losses = [json.loads(line)["loss"] for line in read_lines(tmp_path / "run" / METRICS_FILE)]

    shutil.rmtree(tmp_path / "run/model")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    (tmp_path / "run/checkpoints/latest").write_text("step-00000002")
    manifest = load_manifest(latents / "train")
    shutil.copytree(latents / "train", tmp_path / "kept")
    first = manifest.shards[0]
    write_manifest(latents / "train", [dataclasses.replace(first, program_version="another"), *manifest.shards[1:]])
    refused = program(repo_root, *train)
    shutil.copy(tmp_path / "kept/manifest.json", latents / "train/manifest.json")
    assert refused.returncode == 2
    assert "put back the set it was trained on, or start a new run" in refused.stderr

    result = program(repo_root, *train)
    assert result.returncode == 0, result.stderr
    again = load_pixel_decoder(tmp_path / "run/model").decoder.state_dict()
    assert all(torch.equal(straight[name], again[name]) for name in straight)
    assert [json.loads(line)["loss"] for line in read_lines(tmp_path / "run" / METRICS_FILE)][:4] == losses[:4]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("pairs=somewhere",), "Give either pairs"),
        (("latents=null",), "Give either pairs"),
        (("model.latent=pixel_unshuffle", "model.latent_channels=12"), "set it to vae, or give pairs"),
        (("image_size=32",), r"of 40-pixel images, but image_size 32"),
        (("latents=IDS",), "has no latents"),
        (("model.vae=OTHER",), "were made by the autoencoder"),
        (("latents=/nowhere",), "holds no id set"),
    ],
)
def test_what_does_not_fit_is_refused(settings, decoder_config, tiny_world, tmp_path, overrides, sentence):
    places = {"IDS": str(tiny_world / "ids/train"), "OTHER": str(tmp_path / "vae")}
    for word, place in places.items():
        overrides = tuple(override.replace(word, place) for override in overrides)
    make_vae(tmp_path / "vae", seed=1)
    with pytest.raises(UserError, match=sentence):
        config = load_config(TrainDecoderConfig, decoder_config, (*settings, *overrides))
        open_examples(config, build_latents(config), load_visual_tokenizer(config.tokenizer))


def test_images_that_the_autoencoder_cannot_halve_are_refused(tiny_world, repo_root, latents, tmp_path):
    result = program(
        repo_root,
        "data_prep/cache_latents.py",
        f"run_dir={tmp_path / 'set'}",
        f"pairs={tiny_world / 'pairs'}",
        f"tokenizer={tiny_world / 'tokenizer'}",
        f"vae={latents.parent / 'vae'}",
        "image_size=41",
    )
    assert result.returncode == 2
    assert "image_size 41 is not a multiple of 2" in result.stderr
    assert not (tmp_path / "set").exists()
