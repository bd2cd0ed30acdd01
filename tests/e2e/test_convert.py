"""`launcher/convert.py`: towers and tokenizers in another form, by the program itself."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from lavit_dist.checkpoint.official import load_vision_encoder, load_visual_tokenizer, tokenizer_digest
from lavit_dist.checkpoint.reference import reference_config
from lavit_dist.config.base import build, to_dict
from lavit_dist.config.convert import ConvertTokenizerConfig, ConvertTowerConfig
from lavit_dist.config.model import VisionEncoderConfig
from lavit_dist.errors import UserError
from lavit_dist.models.vision_encoder import VisionEncoder
from pipelines import convert

SIZES = {"image_size": 28, "width": 32, "layers": 1, "head_width": 8, "mlp_hidden": 48, "head_out": 16}


def run(repo_root, *arguments):
    command = [sys.executable, "launcher/convert.py", *map(str, arguments)]
    return subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False)


@pytest.fixture
def source(reference, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(reference / "visual_tokenizer", folder / "visual_tokenizer", copy_function=shutil.copyfile)
    (folder / "visual_tokenizer").chmod(0o755)
    (folder / "visual_tokenizer" / "config.json").write_text(json.dumps(to_dict(reference_config(reference))))
    return folder


def test_a_tower_of_another_layout_becomes_the_released_file(repo_root, tmp_path):
    encoder = VisionEncoder(VisionEncoderConfig(**SIZES))
    torch.save({"module": {f"visual.{key}": tensor for key, tensor in encoder.state_dict().items()}}, tmp_path / "clip.pt")
    settings = [f"encoder.{name}={size}" for name, size in SIZES.items()]
    result = run(repo_root, "tower", tmp_path / "clip.pt", tmp_path / "out", *settings)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.glob("out/*/*")] == ["eva_vitg_psz14.bin"]
    pixels = torch.randn(1, 3, 28, 28)
    assert torch.equal(load_vision_encoder(tmp_path / "out", encoder.config)(pixels), encoder(pixels))
    again = run(repo_root, "tower", tmp_path / "clip.pt", tmp_path / "out", *settings)
    assert again.returncode == 2
    assert "is there already" in again.stderr


def test_a_tokenizer_goes_to_safetensors_and_back(repo_root, source, tmp_path):
    result = run(repo_root, "tokenizer", source, tmp_path / "ours", "form=safetensors")
    assert result.returncode == 0, result.stderr
    convert.tokenizer(ConvertTokenizerConfig(), str(tmp_path / "ours"), str(tmp_path / "back"))
    assert tokenizer_digest(source) == tokenizer_digest(tmp_path / "ours") == tokenizer_digest(tmp_path / "back")
    first, last = load_visual_tokenizer(source).state_dict(), load_visual_tokenizer(tmp_path / "back").state_dict()
    assert all(torch.equal(tensor, last[key]) for key, tensor in first.items())


def test_settings_of_a_conversion(tmp_path):
    torch.save(VisionEncoder(VisionEncoderConfig(**SIZES)).state_dict(), tmp_path / "tower.pt")
    settings = {"encoder": {**SIZES, "image_size": 56}, "form": "safetensors", "dtype": "bf16", "interpolate_positions": True}
    convert.tower(build(ConvertTowerConfig, settings), str(tmp_path / "tower.pt"), str(tmp_path / "out"))
    assert [path.name for path in tmp_path.glob("out/*/*")] == ["eva_vitg_psz14.safetensors"]
    state = load_file(tmp_path / "out" / "visual_tokenizer" / "eva_vitg_psz14.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in state.values())
    assert state["pos_embed"].shape == (1, 17, 32)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tower", "nowhere.pt", "out"], "nowhere.pt is no file"),
        (["tokenizer", "nowhere", "out"], "nowhere holds no visual tokenizer"),
        (["tokenizer", "nowhere", "out", "form=onnx"], "form = 'onnx' is not legal"),
        (["tower", "nowhere.pt", "out", "encoder.widht=3"], "did you mean 'encoder.width'"),
    ],
)
def test_mistakes_are_one_sentence(repo_root, arguments, sentence):
    result = run(repo_root, *arguments)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_source_is_never_overwritten(source):
    with pytest.raises(UserError, match="is there already"):
        convert.tokenizer(ConvertTokenizerConfig(form="safetensors"), str(source), str(source))
