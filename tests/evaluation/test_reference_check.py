"""The released modules are reproduced, and whatever is altered in a folder of reference vectors is found."""

import hashlib
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lavit_dist.checkpoint.official import convert_visual_tokenizer, load_visual_tokenizer, save_visual_tokenizer
from lavit_dist.checkpoint.reference import is_reference_folder, read_vectors, reference_config
from lavit_dist.evaluation.reference_check import KNOWN_SET, check_reference
from lavit_dist.evaluation.reference_vectors import compare_vectors

FILES = ("eva_vitg_psz14", "tokenizer_encoder", "tokenizer_decoder", "highres_tokenizer_decoder")
COMPUTED = {
    "encoder_features",
    "selector_log_probs",
    "keep_mask",
    "merged_features",
    "tokens_per_image",
    "code_ids_plus_32002",
    "quantized",
    "continuous_llm_embeddings",
    "decoder_lowres",
    "decoder_highres_prompt",
    "decoder_highres_pooled",
}


@pytest.fixture
def folder(reference, tmp_path):
    """A copy of the reference to alter."""
    folder = tmp_path / "reference"
    shutil.copytree(reference, folder, copy_function=shutil.copyfile)
    for path in (folder, folder / "visual_tokenizer"):
        path.chmod(0o755)
    return folder


def alter(folder, name, change):
    """Applies `change` to the state dictionary in one file of weights."""
    path = folder / "visual_tokenizer" / f"{name}.bin"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def failed(folder):
    """Names of the rows that are not ok, but for that of known sets, which any altered weight fails."""
    return {row.name for row in check_reference(folder).rows if not row.ok} - {KNOWN_SET}


def test_every_reference_tensor_is_reproduced(reference):
    result = check_reference(reference)
    assert result.ok, [row for row in result.rows if not row.ok]
    assert {row.name for row in result.rows} >= COMPUTED | {f"{name}.bin" for name in FILES}
    assert {"merged_features, kept alone", "ids, kept alone"} <= {row.name for row in result.rows}
    assert any("norm.* and head.*" in note for note in result.notes)


@pytest.mark.parametrize("form", ["official", "safetensors"])
def test_a_conversion_without_loss_is_proved(reference, tmp_path, form):
    """Also of a folder in which `vit_proj` moves to a file of its own."""
    source = tmp_path / "source"
    save_visual_tokenizer(load_visual_tokenizer(reference, config=reference_config(reference)), source)
    convert_visual_tokenizer(source, tmp_path / "converted", form)
    for path in reference.glob("*.*"):
        shutil.copyfile(path, tmp_path / "converted" / path.name)
    assert failed(tmp_path / "converted") == set()
    rounded = tmp_path / "rounded"
    convert_visual_tokenizer(source, rounded, form, torch.bfloat16)
    for path in reference.glob("*.*"):
        shutil.copyfile(path, rounded / path.name)
    assert {"encoder_features", "decoder_lowres"} <= failed(rounded)


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("eva_vitg_psz14", "cls_token"),
        ("eva_vitg_psz14", "blocks.1.mlp.fc2.weight"),
        ("tokenizer_encoder", "token_predictor.out_conv.4.bias"),
        ("tokenizer_encoder", "causal_encoder.ln_vision.weight"),
        ("tokenizer_encoder", "vit_proj.weight"),
        ("tokenizer_decoder", "query_embed"),
        ("tokenizer_decoder", "unet_proj.bias"),
        ("highres_tokenizer_decoder", "in_proj.bias"),
        ("highres_tokenizer_decoder", "unet_attnpool.positional_embedding"),
    ],
)
def test_a_single_altered_weight_is_found(folder, file, key):
    alter(folder, file, lambda state: state[key].view(-1)[:1].add_(0.1))
    assert failed(folder)


def test_an_altered_code_is_found_though_no_image_has_it(folder):
    used = (read_vectors(folder)["code_ids_plus_32002"] - 32002).tolist()

    def change(state):
        state["quantize.embedding.weight"][next(code for code in range(128) if code not in used), 3] += 0.01

    alter(folder, "tokenizer_encoder", change)
    assert failed(folder) == {"codebook"}


@pytest.fixture(scope="module")
def loaded(reference):
    return load_visual_tokenizer(reference, config=reference_config(reference)), read_vectors(reference)


@settings(max_examples=25)
@given(st.data())
def test_any_weight_of_the_tower_and_of_the_decoder_counts(loaded, data):
    """Of those that a vector depends on: not the final norm and head, and no biases of keys."""
    tokenizer, vectors = loaded
    module = data.draw(st.sampled_from([tokenizer.encoder.blocks, tokenizer.decoder.blocks, tokenizer.merger.blocks]))
    state = module.state_dict()
    key = data.draw(st.sampled_from([key for key in state if not key.endswith(("key.bias", "qkv.bias"))]))
    index = data.draw(st.integers(0, state[key].numel() - 1))
    weight = state[key].view(-1)
    before = weight[index].clone()
    weight[index] += 0.5
    try:
        assert not all(row.ok for row in compare_vectors(tokenizer, vectors))
    finally:
        weight[index] = before


def test_a_flipped_bit_is_found_even_where_no_vector_looks(folder):
    path = folder / "visual_tokenizer" / "eva_vitg_psz14.bin"
    head = torch.load(path, weights_only=True)["head.weight"].numpy().tobytes()
    content = path.read_bytes()
    place = content.index(head) + 17
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    assert "eva_vitg_psz14.bin" in failed(folder)


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("eva_vitg_psz14", "head.weight"),
        ("eva_vitg_psz14", "norm.bias"),
        ("tokenizer_encoder", "causal_encoder.blocks.0.token_cross_attn.key.bias"),
        ("tokenizer_decoder", "pos_embed"),
    ],
)
def test_in_a_known_set_a_weight_that_no_vector_shows_is_found(folder, file, key):
    alter(folder, file, lambda state: state[key].view(-1)[-1:].add_(1e-6))
    assert failed(folder) == set()
    assert [row.name for row in check_reference(folder).rows if not row.ok] == [KNOWN_SET]


def test_digests_cover_every_bit(folder):
    def digests():
        return "".join(
            f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n" for path in folder.glob("*/*")
        )

    (folder / "SHA256SUMS").write_text(digests())
    assert failed(folder) == set()
    alter(folder, "eva_vitg_psz14", lambda state: state["head.weight"].view(-1)[3].add_(1e-6))
    assert failed(folder) == {"SHA256SUMS"}
    (folder / "SHA256SUMS").write_text(digests() + "0" * 64 + "  visual_tokenizer/absent.bin\n")
    assert failed(folder) == {"SHA256SUMS"}


CHANGES = {
    "a key dropped": lambda state: state.popitem(),
    "a key added": lambda state: state.update(surplus=torch.zeros(1)),
    "another shape": lambda state: state.update({next(iter(state)): torch.zeros(2, 2)}),
    "not a number": lambda state: next(iter(state.values())).view(-1)[:1].fill_(torch.nan),
}


@pytest.mark.parametrize(
    ("file", "change"), [*((file, "a key dropped") for file in FILES[1:]), *((FILES[0], change) for change in CHANGES)]
)
def test_an_altered_file_is_named(folder, file, change):
    alter(folder, file, CHANGES[change])
    assert f"{file}.bin" in failed(folder)


@pytest.mark.parametrize("file", FILES)
def test_an_absent_file_is_missed(folder, file):
    """By the vectors that need it, where there is no list of keys."""
    (folder / "state_dict_keys.txt").unlink()
    (folder / "visual_tokenizer" / f"{file}.bin").unlink()
    assert any(f"{file}.bin is missing" in row.measured for row in check_reference(folder).rows if not row.ok)


def change_vector(folder, name, change):
    vectors = load_file(folder / "vectors.safetensors")
    vectors[name] = change(vectors[name]).contiguous()
    save_file(vectors, folder / "vectors.safetensors")


def add_to_last(tensor):
    tensor.view(-1)[-1] += 1
    return tensor


@pytest.mark.parametrize("name", sorted(COMPUTED | {"pixel_values"}))
def test_an_altered_vector_is_found(folder, name):
    change_vector(folder, name, add_to_last)
    assert name in failed(folder) or name == "pixel_values"
    assert failed(folder)


def test_noise_that_tips_a_choice_is_found(folder):
    kept = load_file(folder / "vectors.safetensors")["keep_mask"][0, 0] > 0
    change_vector(
        folder, "gumbel_noise", lambda noise: noise.index_put((torch.tensor(0),) * 3, torch.tensor(-99.0 if kept else 99.0))
    )
    assert "keep_mask" in failed(folder)


@pytest.mark.parametrize(
    "name", ["pixel_values", "gumbel_noise", "code_ids_plus_32002", "decoder_lowres", "decoder_highres_pooled"]
)
def test_an_absent_vector_or_one_of_another_shape_is_found(folder, name):
    change_vector(folder, name, lambda tensor: tensor[..., :-1])
    assert name in failed(folder)
    vectors = load_file(folder / "vectors.safetensors")
    del vectors[name]
    save_file(vectors, folder / "vectors.safetensors")
    assert name in failed(folder)


@pytest.mark.parametrize("name", ["pixel_values", "gumbel_noise", "merged_features"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_vector_that_is_not_finite_is_found(folder, name, value):
    change_vector(folder, name, lambda tensor: tensor.flatten().index_fill(0, torch.tensor(5), value).view_as(tensor))
    assert name in failed(folder)


LISTS = {
    "a shape": lambda text: text.replace("(128, 8)", "(128, 9)"),
    "a key": lambda text: text.replace("cls_token", "class_token"),
    "a line dropped": lambda text: text[: text.rindex("\n", 0, -1)],
    "a line added": lambda text: text.rstrip("\n") + "\ntokenizer_decoder.bin\tsurplus\t(1,)\n",
    "a file": lambda text: text.replace("tokenizer_decoder.bin\tpos", "other.bin\tpos"),
    "no list": lambda text: "nothing\n",
}


@pytest.mark.parametrize("change", LISTS)
def test_an_altered_list_of_keys_is_found(folder, change):
    path = folder / "state_dict_keys.txt"
    path.write_text(LISTS[change](path.read_text()))
    assert failed(folder)


def set_size(*keys, value):
    def change(sizes):
        for key in keys[:-1]:
            sizes = sizes[key]
        sizes[keys[-1]] = value

    return change


SIZES = {
    "layers": set_size("encoder", "layers", value=3),
    "heads": set_size("merger", "heads", value=2),
    "a divisor of nothing": set_size("encoder", "head_width", value=7),
    "image size": set_size("image_size", value=70),
    "epsilon": set_size("encoder", "layer_norm_eps", value=1e-3),
    "codes": set_size("codebook", "size", value=64),
    "no width": lambda sizes: sizes["encoder"].pop("width"),
    "no section": lambda sizes: sizes.pop("merger"),
    "a word": set_size("decoder", "depth", value="deep"),
    "an unknown setting": set_size("decoder", "dept", value=2),
    "language model": set_size("llm_hidden", value=32),
}


@pytest.mark.parametrize("change", SIZES)
def test_altered_sizes_are_found(folder, change):
    path = folder / "config.json"
    sizes = json.loads(path.read_text())
    SIZES[change](sizes)
    path.write_text(json.dumps(sizes))
    assert failed(folder)


@pytest.mark.parametrize("name", ["config.json", "vectors.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1, 2]", b"\xff\xfe"])
def test_an_unreadable_file_is_a_failure_not_a_crash(folder, name, content):
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    assert is_reference_folder(folder)
    assert failed(folder)
