"""The released modules, reproduced: every tensor of the reference vectors from the files with the official names."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lavit_dist.checkpoint.official import load_visual_tokenizer, save_visual_tokenizer, tokenizer_digest
from lavit_dist.config.base import build, to_dict
from lavit_dist.config.model import VisualTokenizerConfig
from lavit_dist.errors import UserError
from lavit_dist.models.selector import select

REFERENCE = Path(__file__).parents[3] / "shared" / "reference" / "lavit_tiny"


def reference_config() -> VisualTokenizerConfig:
    sizes = json.loads((REFERENCE / "config.json").read_text())
    encoder, merger, decoder = sizes["encoder"], sizes["merger"], sizes["decoder"]
    return build(
        VisualTokenizerConfig,
        {
            "encoder": {
                "image_size": sizes["image_size"],
                "patch_size": sizes["patch_size"],
                **{key: encoder[key] for key in ("width", "layers", "head_width", "mlp_hidden", "layer_norm_eps", "head_out")},
            },
            "merger": merger,
            "codebook": sizes["codebook"],
            "decoder": {
                "depth": decoder["depth"],
                "heads": decoder["heads"],
                "mlp_hidden": merger["mlp_hidden"],
                "unet_dim": decoder["lowres_out"],
                "highres_dims": decoder["highres_out"],
                "pooled_dim": decoder["pooled"],
            },
            "vit_proj_dim": sizes["llm_hidden"],
        },
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    shutil.copytree(REFERENCE / "visual_tokenizer", folder / "visual_tokenizer")
    (folder / "visual_tokenizer" / "config.json").write_text(json.dumps(to_dict(reference_config())))
    return folder


@pytest.fixture(scope="module")
def vectors():
    return load_file(REFERENCE / "vectors.safetensors")


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().max() / expected.abs().max()
    assert difference <= 1e-5, f"relative difference {difference:.2e}"


def test_every_reference_tensor_is_reproduced(folder, vectors):
    tokenizer = load_visual_tokenizer(folder)
    pixels, noise = vectors["pixel_values"], vectors["gumbel_noise"]
    assert_close(tokenizer.encoder(pixels), vectors["encoder_features"])
    features = tokenizer.encode(pixels)
    log_probs = tokenizer.selector(features)
    assert_close(log_probs, vectors["selector_log_probs"])
    keep_mask = select(log_probs, noise)
    assert torch.equal(keep_mask.long(), vectors["keep_mask"].long())
    assert_close(tokenizer.merger(features, keep_mask.float()), vectors["merged_features"])
    tokenized = tokenizer.tokenize(pixels, noise)
    assert torch.equal(tokenized.keep_mask, keep_mask)
    assert [len(codes) for codes in tokenized.codes] == vectors["tokens_per_image"].tolist()
    assert torch.equal(torch.cat(tokenized.codes) + 32002, vectors["code_ids_plus_32002"].long())
    assert_close(tokenizer.quantizer.embedding(torch.cat(tokenized.codes)), vectors["quantized"])
    assert_close(tokenizer.continuous_embeddings(features, keep_mask), vectors["continuous_llm_embeddings"])
    packed = tokenizer.pack(tokenized.codes)
    assert_close(tokenizer.decoder.condition(*packed), vectors["decoder_lowres"])
    prompt, pooled = tokenizer.highres_decoder.condition(*packed)
    assert_close(prompt, vectors["decoder_highres_prompt"])
    assert_close(pooled, vectors["decoder_highres_pooled"])


def test_saved_folder_loads_back_with_the_official_keys(folder, tmp_path):
    tokenizer = load_visual_tokenizer(folder)
    save_visual_tokenizer(tokenizer, tmp_path)
    listed = [line.split("\t")[:2] for line in (REFERENCE / "state_dict_keys.txt").read_text().splitlines()]
    saved = [
        [path.name, key] for path in (tmp_path / "visual_tokenizer").glob("*.bin") for key in torch.load(path, weights_only=True)
    ]
    assert sorted(saved) == sorted(listed)
    again = load_visual_tokenizer(tmp_path)
    for key, tensor in tokenizer.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key])


def test_digest_follows_what_decides_the_codes(folder, tmp_path):
    shutil.copytree(folder / "visual_tokenizer", tmp_path / "visual_tokenizer")
    before = tokenizer_digest(tmp_path)
    tokenizer = load_visual_tokenizer(tmp_path)
    torch.nn.init.normal_(tokenizer.decoder.in_proj.weight)
    torch.save(tokenizer.decoder.state_dict(), tmp_path / "visual_tokenizer" / "tokenizer_decoder.bin")
    assert tokenizer_digest(tmp_path) == before
    torch.nn.init.normal_(tokenizer.quantizer.embedding.weight)
    torch.save(tokenizer.tokenizer_encoder.state_dict(), tmp_path / "visual_tokenizer" / "tokenizer_encoder.bin")
    assert tokenizer_digest(tmp_path) != before


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "pickle", "absent"])
def test_a_wrong_file_is_named(folder, tmp_path, change):
    shutil.copytree(folder / "visual_tokenizer", tmp_path / "visual_tokenizer")
    path = tmp_path / "visual_tokenizer" / "tokenizer_encoder.bin"
    state = torch.load(path, weights_only=True)
    if change == "missing":
        del state["quantize.embedding.weight"]
    elif change == "extra":
        state["surplus"] = torch.zeros(1)
    elif change == "shape":
        state["quantize.embedding.weight"] = torch.zeros(3, 3)
    elif change == "pickle":
        state = {"code": test_a_wrong_file_is_named}
    torch.save(state, path)
    if change == "absent":
        path.unlink()
    with pytest.raises(UserError, match=r"tokenizer_encoder\.bin"):
        load_visual_tokenizer(tmp_path)
