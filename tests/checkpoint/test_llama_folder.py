"""A folder that LlamaForCausalLM reads is read to the same tensors; what isn't quite one is refused with a sentence."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lavit_dist.checkpoint.llama_folder import LlamaFolder
from lavit_dist.config.model import LlamaConfig, RopeScalingConfig
from lavit_dist.errors import UserError
from lavit_dist.models.llama import EMBEDDING, HEAD

MODEL = LlamaConfig(
    hidden_size=32,
    num_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    ffn_hidden_size=48,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not ...}))


def change_weights(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path) | changes
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, path)


@pytest.mark.parametrize("form", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_those_that_were_saved(save_llama, tmp_path, form, dtype):
    saved = save_llama(tmp_path / "llama", form=form, dtype=dtype).state_dict()
    suffix = form.split()[-1]
    assert (len(list((tmp_path / "llama").glob(f"*model*.{suffix}"))) > 1) == ("sharded" in form)
    folder = LlamaFolder(tmp_path / "llama")
    folder.check_model(MODEL)
    assert folder.dtypes() == {dtype}
    for name, tensor in saved.items():
        assert torch.equal(folder.read(name), tensor)
        assert torch.equal(folder.read(name, 3, 7), tensor[3:7])


def test_a_tied_head_is_the_embedding(save_llama, tmp_path):
    save_llama(tmp_path, tie_word_embeddings=True)
    folder = LlamaFolder(tmp_path)
    assert HEAD not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(folder.read(HEAD, 2), folder.read(EMBEDDING, 2))


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (LLAMA3, RopeScalingConfig(rope_type="llama3", factor=8.0, original_max_position_embeddings=32)),
        ({"rope_type": "linear", "rope_theta": 500000.0, "factor": 2.0}, RopeScalingConfig(rope_type="linear", factor=2.0)),
        ({"rope_type": "default", "rope_theta": 500000.0}, None),
    ],
)
def test_rotary_positions_of_both_generations_of_config(save_llama, tmp_path, version, rope, expected):
    save_llama(tmp_path, rope_parameters=rope)
    if version == 4:
        older = {"type" if name == "rope_type" else name: value for name, value in rope.items() if name != "rope_theta"}
        scaling = None if expected is None else older
        change_config(tmp_path, rope_parameters=..., rope_theta=rope["rope_theta"], rope_scaling=scaling)
    LlamaFolder(tmp_path).check_model(dataclasses.replace(MODEL, rope_theta=500000.0, rope_scaling=expected))


def test_a_buffer_of_old_files_is_passed_over(save_llama, tmp_path):
    save_llama(tmp_path)
    change_weights(tmp_path, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    LlamaFolder(tmp_path)


def test_wrong_tensors_are_named_in_one_sentence(save_llama, tmp_path):
    save_llama(tmp_path)
    change_weights(tmp_path, {"model.norm.weight": None, "surplus": torch.ones(1), HEAD: torch.ones(60, 31)})
    with pytest.raises(
        UserError, match=r"missing model\.norm\.weight; extra surplus; misshapen lm_head\.weight \[60, 31\] for \[60, 32\]"
    ):
        LlamaFolder(tmp_path)


def test_an_untied_head_must_be_there(save_llama, tmp_path):
    save_llama(tmp_path)
    change_weights(tmp_path, {HEAD: None})
    with pytest.raises(UserError, match=r"missing lm_head\.weight"):
        LlamaFolder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, r"set model\.hidden_size to 32 \(it is 64\)"),
        ({"num_layers": 3}, r"model\.num_layers to 2 \(it is 3\)"),
        ({"num_attention_heads": 2}, r"model\.num_attention_heads to 4 \(it is 2\), model\.head_dim to 8 \(it is 16\)"),
        ({"num_key_value_heads": 4}, r"model\.num_key_value_heads to 2"),
        ({"ffn_hidden_size": 64}, r"model\.ffn_hidden_size to 48"),
        ({"rms_norm_eps": 1e-5}, r"model\.rms_norm_eps to 1e-06"),
        ({"rope_theta": 1.0}, r"model\.rope_theta to 10000\.0"),
        ({"rope_scaling": RopeScalingConfig(rope_type="linear", factor=2.0)}, r"model\.rope_scaling to None"),
        ({"head_dim": 16}, r"model\.head_dim to 8"),
    ],
)
def test_another_model_is_refused_with_the_settings_to_change(save_llama, tmp_path, changes, message):
    save_llama(tmp_path)
    with pytest.raises(UserError, match=message):
        LlamaFolder(tmp_path).check_model(dataclasses.replace(MODEL, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "of type mistral, but only llama"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "by yarn"),
        ({"hidden_size": ...}, "doesn't say hidden_size"),
        ({"hidden_size": "wide"}, "config.json"),
    ],
)
def test_what_this_llama_is_not_is_refused(save_llama, tmp_path, changes, message):
    save_llama(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        LlamaFolder(tmp_path)


def test_a_missing_file_is_named(save_llama, tmp_path):
    save_llama(tmp_path / "llama", form="sharded bin")
    (tmp_path / "llama" / "pytorch_model-00002-of-00005.bin").unlink()
    with pytest.raises(UserError, match=r"files that are missing: pytorch_model-00002-of-00005\.bin"):
        LlamaFolder(tmp_path / "llama")
    with pytest.raises(UserError, match=r"it has no config\.json"):
        LlamaFolder(tmp_path)
    change_config(tmp_path / "llama")
    (tmp_path / "llama" / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        LlamaFolder(tmp_path / "llama")


def test_a_file_that_would_be_loaded_whole_for_every_tensor_is_refused(save_llama, tmp_path):
    weights = save_llama(tmp_path, form="bin").state_dict()
    torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(
        UserError, match=r"pytorch_model\.bin has torch's format of before 1\.6, .* save the model again as safetensors"
    ):
        LlamaFolder(tmp_path)


def test_numbers_that_are_not_finite_are_named(save_llama, tmp_path):
    save_llama(tmp_path)
    change_weights(tmp_path, {"model.norm.weight": torch.full((32,), torch.nan)})
    with pytest.raises(UserError, match=r"not finite in model\.norm\.weight"):
        LlamaFolder(tmp_path).read("model.norm.weight")
