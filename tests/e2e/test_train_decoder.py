"""launcher/train_decoder.py as a user starts it: resumed bit for bit, on two processes, from other weights, and refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from lavit_dist.checkpoint.official import load_visual_tokenizer, tokenizer_digest
from lavit_dist.checkpoint.pixel_decoding import load_pixel_decoder
from lavit_dist.config.base import load_config
from lavit_dist.config.decoder import TrainDecoderConfig
from lavit_dist.errors import UserError
from lavit_dist.models.pixel_decoder import PixelFolding, VaeLatents, build_unet
from lavit_dist.observe.metrics import METRICS_FILE, read_lines
from lavit_dist.parallel.distributed import free_port
from pipelines.train_decoder import build_decoder


def train(repo_root: Path, config: Path, run_dir: Path, *overrides: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    program = [sys.executable]
    if processes > 1:
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        program = [launcher, "--num_gpus", str(processes), "--master_port", str(free_port())]
    command = [*program, "launcher/train_decoder.py", "--config", str(config), f"run_dir={run_dir}", *overrides]
    return subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=180, check=False)


def records(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in read_lines(run_dir / METRICS_FILE)]


def test_a_resumed_run_equals_the_straight_one(tiny_decoder, decoder_config, repo_root, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(tiny_decoder, cut)
    shutil.rmtree(cut / "model")
    shutil.rmtree(cut / "checkpoints/step-00000006")
    (cut / "checkpoints/latest").write_text("step-00000003")
    (cut / METRICS_FILE).write_text("".join(line + "\n" for line in read_lines(tiny_decoder / METRICS_FILE)[:4]))

    resumed = train(repo_root, decoder_config, cut)
    assert resumed.returncode == 0, resumed.stderr
    for name in ("loss", "error", "grad_norm", "learning_rate"):
        assert [record[name] for record in records(cut)] == [record[name] for record in records(tiny_decoder)]
    straight, again = (load_pixel_decoder(run / "model").decoder.state_dict() for run in (tiny_decoder, cut))
    assert all(torch.equal(straight[name], again[name]) for name in straight)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_goes_on_with_another_number_of_processes(decoder_config, repo_root, tmp_path, optimizer):
    """To 1e-3: a U-Net's convolutions round otherwise for other numbers of images, and training is steep here (norms up to 30)."""
    settings = (f"optimizer.name={optimizer}", "checkpoint.keep_last=9", "total_steps=8", "checkpoint.every_steps=3")
    run_dir, straight = tmp_path / "reshaped", tmp_path / "straight"
    assert train(repo_root, decoder_config, straight, *settings).returncode == 0
    shutil.copytree(straight, run_dir)
    for processes, start in ((2, 3), (1, 6)):
        shutil.rmtree(run_dir / "model")
        for step in (run_dir / "checkpoints").glob("step-*"):
            if int(step.name[-8:]) > start:
                shutil.rmtree(step)
        resumed = train(
            repo_root,
            decoder_config,
            run_dir,
            *settings,
            f"zero_stage={(processes - 1) * (optimizer == 'adamw')}",
            processes=processes,
        )
        assert resumed.returncode == 0, resumed.stdout + resumed.stderr
        assert f"step-{start:08d}" in resumed.stdout + resumed.stderr
        for name in ("loss", "grad_norm"):
            found, expected = ([record[name] for record in records(of)] for of in (run_dir, straight))
            assert found == pytest.approx(expected, rel=1e-3 if optimizer == "adamw" else 1e-2)


def test_the_product_holds_the_tokenizer_with_a_trained_projection(tiny_decoder, tiny_world):
    loaded = load_pixel_decoder(tiny_decoder / "model")
    assert isinstance(loaded.latents, PixelFolding)
    assert tokenizer_digest(tiny_decoder / "model") == tokenizer_digest(tiny_world / "tokenizer")
    before = torch.load(tiny_world / "tokenizer/visual_tokenizer/tokenizer_decoder.bin", weights_only=True)
    after = loaded.tokenizer.decoder.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"unet_proj.weight", "unet_proj.bias"}


def test_two_processes_paint_latents_of_an_autoencoder_from_a_given_unet(decoder_config, repo_root, tmp_path):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, scaling_factor=0.5, **blocks).save_pretrained(tmp_path / "vae")
    settings = (
        f"run_dir={tmp_path / 'run'}",
        "model.latent=vae",
        f"model.vae={tmp_path / 'vae'}",
        "model.latent_channels=4",
        "model.concatenate_condition=false",
        "zero_stage=1",
        f"initial_unet={tmp_path / 'unet'}",
        "optimizer.learning_rate=1e-12",
        "optimizer.weight_decay=0",
        "total_steps=2",
    )
    config = load_config(TrainDecoderConfig, decoder_config, settings)
    given = build_unet(config.model, config.latent_size, 16)
    given.save_pretrained(tmp_path / "unet")
    result = train(repo_root, decoder_config, tmp_path / "run", *settings, processes=2)
    assert result.returncode == 0, result.stderr
    loaded = load_pixel_decoder(tmp_path / "run/model")
    assert isinstance(loaded.latents, VaeLatents)
    trained = loaded.decoder.unet.state_dict()
    assert all(torch.allclose(tensor, trained[name], atol=1e-6) for name, tensor in given.state_dict().items())


def test_a_unet_of_other_sizes_is_refused(decoder_config, tiny_world, tmp_path):
    settings = (f"run_dir={tmp_path}", f"initial_unet={tmp_path / 'unet'}")
    config = load_config(TrainDecoderConfig, decoder_config, settings)
    build_unet(config.model, config.latent_size, condition_dim=24).save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match="in_channels = 36"):
        build_decoder(config, load_visual_tokenizer(tiny_world / "tokenizer"))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("image_size=30", "image_size"),
        ("model.latent_channels=11", "latent_channels"),
        ("global_batch_sise=4", "global_batch_size"),
        ("condition_dropout=1", "condition_dropout"),
        ("snr_floor=9", "snr_floor"),
        ("snr_floor=1", "loss_weighting"),
    ],
)
def test_wrong_settings_are_named(decoder_config, tmp_path, override, named):
    with pytest.raises(UserError, match=named):
        load_config(TrainDecoderConfig, decoder_config, (f"run_dir={tmp_path}", override))


def test_muon_under_zero_is_refused(decoder_config, tmp_path):
    with pytest.raises(UserError, match="set zero_stage to 0"):
        load_config(TrainDecoderConfig, decoder_config, (f"run_dir={tmp_path}", "optimizer.name=muon", "zero_stage=1"))


def test_a_missing_tokenizer_is_one_sentence_before_anything_is_written(decoder_config, repo_root, tmp_path):
    refused = train(repo_root, decoder_config, tmp_path / "run", "tokenizer=/nowhere")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "/nowhere" in refused.stderr
    assert not (tmp_path / "run").exists()
