"""The released folder layout: what is saved loads back in every form, sizes are those of the release, and a wrong file is named."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lavit_dist.checkpoint.official import (
    SUFFIXES,
    convert_visual_tokenizer,
    load_vision_encoder,
    load_visual_tokenizer,
    save_vision_encoder,
    save_visual_tokenizer,
    tokenizer_digest,
)
from lavit_dist.checkpoint.reference import reference_config
from lavit_dist.config.base import to_dict
from lavit_dist.config.model import VisionEncoderConfig, VisualTokenizerConfig
from lavit_dist.errors import UserError
from lavit_dist.models.vision_encoder import VisionEncoder
from lavit_dist.models.visual_tokenizer import VisualTokenizer

BF16_BYTES = {"encoder": 2_025_177_856, "tokenizer_encoder": 808_096_260, "understanding": 808_077_312, "decoder": 808_163_584}
"""Payloads of the released files, shared/reference/README.md."""


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    """The reference's weights with sizes in our words; `vit_proj` lies in tokenizer_encoder.bin."""
    folder = tmp_path_factory.mktemp("released")
    shutil.copytree(reference / "visual_tokenizer", folder / "visual_tokenizer", copy_function=shutil.copyfile)
    (folder / "visual_tokenizer").chmod(0o755)
    (folder / "visual_tokenizer" / "config.json").write_text(json.dumps(to_dict(reference_config(reference))))
    return folder


@pytest.fixture(scope="module")
def official(folder, tmp_path_factory):
    """The same as the release has it, with a second merger of other weights."""
    tokenizer = load_visual_tokenizer(folder)
    torch.manual_seed(0)
    torch.nn.init.normal_(tokenizer.understanding.causal_encoder.norm.weight)
    official = tmp_path_factory.mktemp("official")
    save_visual_tokenizer(tokenizer, official)
    return official


def inputs(tokenizer):
    config = tokenizer.config.encoder
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, config.image_size, config.image_size, generator=generator)
    return pixels, torch.randn(2, config.num_patches, 2, generator=generator)


def assert_same_weights(left, right):
    right = right.state_dict()
    assert left.state_dict().keys() == right.keys()
    for key, tensor in left.state_dict().items():
        assert torch.equal(tensor, right[key]), key


def test_the_full_size_is_that_of_the_release():
    with torch.device("meta"):
        tokenizer = VisualTokenizer(VisualTokenizerConfig(vit_proj_dim=4096))
    assert sum(parameter.numel() for parameter in tokenizer.encoder.parameters()) == 1_012_588_928
    for name, size in BF16_BYTES.items():
        assert sum(tensor.numel() * 2 for tensor in getattr(tokenizer, name).state_dict().values()) == size, name


@pytest.mark.parametrize("form", ["official", "safetensors"])
def test_a_saved_folder_loads_back(official, tmp_path, form):
    tokenizer = load_visual_tokenizer(official)
    save_visual_tokenizer(tokenizer, tmp_path, form)
    assert_same_weights(tokenizer, load_visual_tokenizer(tmp_path))
    assert tokenizer_digest(tmp_path) == tokenizer_digest(official)


def test_official_files_hold_the_official_keys(folder, reference, official):
    listed = {tuple(line.split("\t")[:2]) for line in (reference / "state_dict_keys.txt").read_text().splitlines()}
    merger = {key for name, key in listed if name == "tokenizer_encoder.bin" and key.startswith("causal_encoder.")}
    projection = {"vit_proj.weight", "vit_proj.bias"}
    expected = {entry for entry in listed if entry[1] not in projection}
    expected |= {("visual_weight.bin", key) for key in merger | projection}
    saved = {(path.name, key) for path in official.glob("*/*.bin") for key in torch.load(path, weights_only=True)}
    assert saved == expected


def test_the_second_merger_is_that_of_visual_weight(folder, official):
    """Without the file, the merger beside `vit_proj` serves both ends; with it, codes and language model have one each."""
    both, apart = load_visual_tokenizer(folder), load_visual_tokenizer(official)
    assert_same_weights(both.merger, both.understanding.causal_encoder)
    assert_same_weights(both.merger, apart.merger)
    assert not torch.equal(apart.merger.norm.weight, apart.understanding.causal_encoder.norm.weight)
    pixels, noise = inputs(both)
    features = both.encode(pixels)
    keep_mask = both.tokenize_features(features, noise).keep_mask
    assert not torch.allclose(both.continuous_embeddings(features, keep_mask), apart.continuous_embeddings(features, keep_mask))


def test_visual_weight_goes_before_a_projection_in_tokenizer_encoder(folder, official, tmp_path):
    shutil.copytree(official, tmp_path, dirs_exist_ok=True)
    shutil.copy(folder / "visual_tokenizer" / "tokenizer_encoder.bin", tmp_path / "visual_tokenizer")
    assert_same_weights(load_visual_tokenizer(tmp_path), load_visual_tokenizer(official))


def test_without_a_projection_there_is_no_second_merger(official, tmp_path):
    tokenizer = load_visual_tokenizer(official)
    tokenizer.understanding = None
    tokenizer.config = dataclasses.replace(tokenizer.config, vit_proj_dim=None)
    save_visual_tokenizer(tokenizer, tmp_path)
    assert not (tmp_path / "language_model").exists()
    assert load_visual_tokenizer(tmp_path).understanding is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["official", "safetensors"])
def test_half_precision_files_are_half_as_large_and_load_as_what_they_hold(official, tmp_path, dtype, form):
    tokenizer = load_visual_tokenizer(official)
    save_visual_tokenizer(tokenizer, tmp_path / "saved", form, dtype)
    convert_visual_tokenizer(official, tmp_path / "converted", form, dtype)
    for path in (tmp_path / "saved").glob(f"*/*{SUFFIXES[form]}"):
        state = load_file(path) if form == "safetensors" else torch.load(path, weights_only=True)
        assert all(tensor.dtype == dtype for tensor in state.values())
        assert path.read_bytes() == (tmp_path / "converted" / path.relative_to(tmp_path / "saved")).read_bytes()
    rounded = load_visual_tokenizer(tmp_path / "saved")
    for key, tensor in tokenizer.state_dict().items():
        assert torch.equal(tensor.to(dtype).float(), rounded.state_dict()[key])


def test_only_layers_with_matrices_are_low_precision_and_compute_as_autocast_does(official):
    low, full = load_visual_tokenizer(official, torch.bfloat16), load_visual_tokenizer(official)
    exact = {id(module) for module in low.selector.modules()}
    for module in low.modules():
        matrices = isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and id(module) not in exact
        expected = torch.bfloat16 if matrices else torch.float32
        assert all(parameter.dtype == expected for parameter in module.parameters(recurse=False))
    pixels, noise = inputs(low)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(low.encode(pixels), full.encode(pixels))
        assert torch.equal(torch.cat(low.tokenize(pixels, noise).codes), torch.cat(full.tokenize(pixels, noise).codes))


def test_what_files_do_not_hold_is_as_in_a_new_model(folder):
    loaded, new = load_visual_tokenizer(folder), VisualTokenizer(load_visual_tokenizer(folder).config)
    for (name, buffer), (_, fresh) in zip(loaded.named_buffers(), new.named_buffers(), strict=True):
        assert torch.equal(buffer, fresh), name
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])


def test_weights_outlive_their_file(official, tmp_path):
    """Loaded weights are copies: to overwrite or remove the file in place doesn't disturb them."""
    shutil.copytree(official, tmp_path, dirs_exist_ok=True)
    tokenizer = load_visual_tokenizer(tmp_path)
    before = tokenizer.encode(inputs(tokenizer)[0])
    for path in tmp_path.glob("*/*.bin"):
        path.write_bytes(b"")
    assert torch.equal(tokenizer.encode(inputs(tokenizer)[0]), before)


@pytest.mark.parametrize("form", ["official", "safetensors"])
def test_the_tower_alone(tmp_path, form):
    config = VisionEncoderConfig(image_size=28, width=32, layers=2, head_width=8, mlp_hidden=48, head_out=16)
    encoder = VisionEncoder(config)
    save_vision_encoder(encoder, tmp_path, form)
    assert_same_weights(encoder, load_vision_encoder(tmp_path, config))


def test_digest_follows_what_decides_the_codes(folder, official, tmp_path):
    assert tokenizer_digest(folder) == tokenizer_digest(official)
    tokenizer = load_visual_tokenizer(official)

    def digest(name):
        save_visual_tokenizer(tokenizer, tmp_path / name)
        return tokenizer_digest(tmp_path / name)

    torch.nn.init.normal_(tokenizer.decoder.in_proj.weight)
    torch.nn.init.normal_(tokenizer.understanding.vit_proj.weight)
    assert digest("other ends") == tokenizer_digest(official)
    torch.nn.init.normal_(tokenizer.quantizer.embedding.weight)
    other_codes = digest("other codes")
    assert other_codes != tokenizer_digest(official)
    sizes = tmp_path / "other codes" / "visual_tokenizer" / "config.json"
    sizes.write_text(json.dumps(json.loads(sizes.read_text()) | {"merger": {"layers": 2, "heads": 8, "mlp_hidden": 209}}))
    assert tokenizer_digest(tmp_path / "other codes") != other_codes


WRONG = {
    "missing": (lambda state: state.pop("quantize.embedding.weight"), "missing keys quantize.embedding.weight, extra keys none"),
    "extra": (lambda state: state.update(surplus=torch.zeros(1)), "missing keys none, extra keys surplus"),
    "shape": (
        lambda state: state.update({"quantize.embedding.weight": torch.zeros(3, 3)}),
        r"quantize.embedding.weight has shape \(3, 3\), but the model has \(128, 8\)",
    ),
    "integers": (
        lambda state: state.update({"quantize.embedding.weight": torch.zeros(128, 8, dtype=torch.int64)}),
        "quantize.embedding.weight holds no floating-point numbers",
    ),
}


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_file_is_named_and_what_is_wrong_with_it(folder, tmp_path, change, suffix):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "visual_tokenizer" / "tokenizer_encoder.bin"
    state = torch.load(path, weights_only=True)
    path.unlink()
    alter, sentence = WRONG[change]
    alter(state)
    (torch.save if suffix == ".bin" else save_file)(state, path.with_suffix(suffix))
    with pytest.raises(UserError, match=rf"tokenizer_encoder\{suffix}.*{sentence}"):
        load_visual_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("code", {"code": test_the_full_size_is_that_of_the_release}, "is not a file of plain tensors"),
        ("a list", [torch.zeros(1)], "holds something else than tensors by name"),
        ("a nest", {"model": {"a": torch.zeros(1)}}, "holds something else than tensors by name"),
    ],
)
def test_only_tensors_by_name_are_read(folder, tmp_path, name, content, sentence):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    torch.save(content, tmp_path / "visual_tokenizer" / "tokenizer_encoder.bin")
    with pytest.raises(UserError, match=rf"tokenizer_encoder\.bin {sentence}"):
        load_visual_tokenizer(tmp_path)


def test_a_folder_that_is_not_whole_is_refused(folder, official, tmp_path):
    shutil.copytree(official, tmp_path, dirs_exist_ok=True)
    decoder = tmp_path / "visual_tokenizer" / "tokenizer_decoder.bin"
    save_file(torch.load(decoder, weights_only=True), decoder.with_suffix(".safetensors"))
    with pytest.raises(UserError, match=r"tokenizer_decoder\.bin and tokenizer_decoder\.safetensors are both there"):
        load_visual_tokenizer(tmp_path)
    decoder.with_suffix(".safetensors").unlink()
    with pytest.raises(UserError, match=r"highres_tokenizer_decoder\.bin is of another tokenizer"):
        tokenizer = load_visual_tokenizer(folder)
        tokenizer.highres_decoder = None
        save_visual_tokenizer(tokenizer, tmp_path)
    (tmp_path / "language_model" / "visual_weight.bin").unlink()
    with pytest.raises(UserError, match=r"vit_proj_dim is 64, but no file holds vit_proj"):
        load_visual_tokenizer(tmp_path)
    decoder.unlink()
    with pytest.raises(UserError, match=r"The file .*tokenizer_decoder\.bin is missing"):
        load_visual_tokenizer(tmp_path)
    with pytest.raises(UserError, match="holds no visual tokenizer"):
        load_visual_tokenizer(tmp_path / "nowhere")


def test_a_tower_of_another_layout_is_told_how_to_convert(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "visual_tokenizer" / "eva_vitg_psz14.bin"
    torch.save({f"visual.{key}": tensor for key, tensor in torch.load(path, weights_only=True).items()}, path)
    with pytest.raises(UserError, match=r"launcher/convert\.py tower"):
        load_visual_tokenizer(tmp_path)
