"""EVA-CLIP towers in the layouts that people have: a converted tower computes what the source computed."""

import pytest
import torch
from safetensors.torch import save_file

from lavit_dist.checkpoint.eva_clip import read_eva_clip
from lavit_dist.checkpoint.official import load_vision_encoder, write_vision_encoder
from lavit_dist.config.model import VisionEncoderConfig
from lavit_dist.errors import UserError
from lavit_dist.models.vision_encoder import VisionEncoder

SIZES = {"width": 32, "layers": 3, "head_width": 8, "mlp_hidden": 48, "head_out": 16}
CONFIG = VisionEncoderConfig(image_size=56, **SIZES)
TEXT_TOWER = {
    "logit_scale": torch.ones([]),
    "text.positional_embedding": torch.zeros(77, 8),
    "text.transformer.resblocks.0.attn.in_proj_weight": torch.zeros(24, 8),
    "token_embedding.weight": torch.zeros(10, 8),
}


@pytest.fixture(scope="module")
def encoder():
    """A tower none of whose tensors is constant."""
    torch.manual_seed(0)
    encoder = VisionEncoder(CONFIG).requires_grad_(False)
    for parameter in encoder.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return encoder


def prefixed(prefix, state):
    return {prefix + key: tensor for key, tensor in state.items()}


def pooled_after_norm(state):
    """timm's names where the mean of the patches is pooled."""
    return {key.replace("norm.", "fc_norm.") if key.startswith("norm.") else key: tensor for key, tensor in state.items()}


def fused_bias(state, key_bias=0.0):
    fused = {key: tensor for key, tensor in state.items() if not key.endswith(("q_bias", "v_bias"))}
    for block in range(SIZES["layers"]):
        query, value = (state[f"blocks.{block}.attn.{part}_bias"] for part in "qv")
        fused[f"blocks.{block}.attn.qkv.bias"] = torch.cat([query, torch.full_like(query, key_bias), value])
    return fused


def key_bias(state):
    zeros = {f"blocks.{block}.attn.k_bias": torch.zeros(SIZES["width"]) for block in range(SIZES["layers"])}
    return {**state, **zeros}


def separate(state):
    """Three projections, as timm has them with `qkv_fused=False`."""
    apart = {}
    for key, tensor in state.items():
        if key.endswith("qkv.weight"):
            for part, weight in zip("qkv", tensor.chunk(3), strict=True):
                apart[key.replace("qkv.", f"{part}_proj.")] = weight.clone()
        else:
            apart[key.replace("q_bias", "q_proj.bias").replace("v_bias", "v_proj.bias")] = tensor
    return apart


def projection_outside(state):
    """open_clip with timm's trunk and a projection of its own."""
    trunk = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
    return prefixed("visual.trunk.", trunk) | {"visual.head.proj.weight": state["head.weight"]}


LAYOUTS = {
    "the official file": lambda state: state,
    "BAAI's whole CLIP": lambda state: prefixed("visual.", state) | TEXT_TOWER,
    "BAAI's, of a DeepSpeed training": lambda state: {"module": prefixed("visual.", state) | TEXT_TOWER, "epoch": 3},
    "wrapped in model": lambda state: {"model": state},
    "wrapped in state_dict, of a distributed training": lambda state: {
        "state_dict": prefixed("module.visual.", state) | prefixed("module.", TEXT_TOWER),
        "optimizer": {"state": {0: {"step": torch.zeros(1)}}},
    },
    "timm's": key_bias,
    "timm's with a fused bias": fused_bias,
    "timm's pooled after the norm": pooled_after_norm,
    "timm's with three projections": separate,
    "open_clip's": lambda state: prefixed("visual.trunk.", key_bias(state)) | TEXT_TOWER,
    "open_clip's with fused bias, pooled": lambda state: prefixed("visual.trunk.", pooled_after_norm(fused_bias(state))),
    "with remains of masked pretraining": lambda state: {**state, "mask_token": torch.zeros(1, 1, 32)},
    "with a key bias, which a softmax takes out": lambda state: fused_bias(state, 0.7),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_converted_tower_computes_what_the_source_computed(encoder, tmp_path, layout, dtype):
    state = {key: tensor.to(dtype) for key, tensor in encoder.state_dict().items()}
    torch.save(LAYOUTS[layout](state), tmp_path / "source.pt")
    converted = read_eva_clip(tmp_path / "source.pt", CONFIG)
    write_vision_encoder(converted, tmp_path)
    loaded = load_vision_encoder(tmp_path, CONFIG)
    encoder = VisionEncoder(CONFIG)
    encoder.load_state_dict(state)
    pixels = torch.randn(2, 3, 56, 56)
    assert torch.equal(loaded(pixels), encoder(pixels))
    assert torch.equal(loaded.embed(pixels), encoder.embed(pixels))


def test_safetensors_are_read(encoder, tmp_path):
    save_file(prefixed("visual.trunk.", encoder.state_dict()), tmp_path / "model.safetensors")
    converted = read_eva_clip(tmp_path / "model.safetensors", CONFIG)
    assert all(torch.equal(tensor, converted[key]) for key, tensor in encoder.state_dict().items())


def test_a_projection_without_bias_has_a_bias_of_zero(encoder, tmp_path):
    torch.save(projection_outside(encoder.state_dict()), tmp_path / "source.pt")
    converted = read_eva_clip(tmp_path / "source.pt", CONFIG)
    assert torch.equal(converted["head.weight"], encoder.head.weight)
    assert not converted["head.bias"].any()


def test_positions_of_another_image_size_are_resampled_only_when_asked(encoder, tmp_path):
    torch.save(encoder.state_dict(), tmp_path / "source.pt")
    larger = VisionEncoderConfig(image_size=84, **SIZES)
    with pytest.raises(UserError, match=r"of images of 56 pixels, but encoder\.image_size is 84; set interpolate_positions=true"):
        read_eva_clip(tmp_path / "source.pt", larger)
    state = read_eva_clip(tmp_path / "source.pt", larger, interpolate_positions=True)
    assert state["pos_embed"].shape == (1, 37, 32)
    assert torch.equal(state["pos_embed"][:, 0], encoder.pos_embed[:, 0])
    assert all(torch.equal(state[key], tensor) for key, tensor in encoder.state_dict().items() if key != "pos_embed")


def test_a_constant_position_table_stays_constant(encoder, tmp_path):
    state = encoder.state_dict() | {"pos_embed": torch.full((1, 17, 32), 0.5)}
    torch.save(state, tmp_path / "source.pt")
    for size in (28, 84):
        config = VisionEncoderConfig(image_size=size, **SIZES)
        table = read_eva_clip(tmp_path / "source.pt", config, interpolate_positions=True)["pos_embed"]
        torch.testing.assert_close(table, torch.full_like(table, 0.5))


@pytest.mark.parametrize("lacking", [("norm", "head"), ("head",)])
def test_a_missing_head_is_filled_only_when_asked(encoder, tmp_path, lacking):
    """As timm saves a model with `num_classes=0`, or LAVIS its tower."""
    state = {
        key: tensor for key, tensor in encoder.state_dict().items() if not key.startswith(tuple(f"{name}." for name in lacking))
    }
    torch.save(state, tmp_path / "source.pt")
    with pytest.raises(UserError, match=rf"holds no {lacking[0]}\.weight.*fill_missing_head=true"):
        read_eva_clip(tmp_path / "source.pt", CONFIG)
    write_vision_encoder(read_eva_clip(tmp_path / "source.pt", CONFIG, fill_missing_head=True), tmp_path)
    pixels = torch.randn(1, 3, 56, 56)
    assert torch.equal(load_vision_encoder(tmp_path, CONFIG)(pixels), encoder(pixels))


REFUSED = {
    "another architecture": (lambda state: {"conv1.weight": torch.zeros(3, 3)}, "holds no EVA-CLIP tower: it has no patch_embed"),
    "rotary positions and gates": (
        lambda state: {**state, "blocks.0.mlp.fc1_g.weight": torch.zeros(3, 3)},
        r"missing none, extra blocks\.0\.mlp\.fc1_g\.weight",
    ),
    "layer scale": (lambda state: {**state, "blocks.1.gamma_1": torch.zeros(3)}, r"extra blocks\.1\.gamma_1"),
    "another depth": (
        lambda state: {key: tensor for key, tensor in state.items() if not key.startswith("blocks.2.")},
        r"missing blocks\.2\..* and 8 more, extra none; .* or correct encoder\.layers",
    ),
    "a classifier": (
        lambda state: {**state, "head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)},
        r"head\.weight has shape \(10, 32\), but the settings of encoder ask for \(16, 32\)",
    ),
    "another patch size": (
        lambda state: {**state, "patch_embed.proj.weight": torch.zeros(32, 3, 16, 16)},
        r"patch_embed\.proj\.weight has shape \(32, 3, 16, 16\)",
    ),
    "no square of positions": (lambda state: {**state, "pos_embed": torch.zeros(1, 12, 32)}, "no square grid and a class token"),
    "two norms": (
        lambda state: {**state, "fc_norm.weight": torch.ones(32), "fc_norm.bias": torch.zeros(32)},
        "both norm and fc_norm",
    ),
    "quantized weights": (
        lambda state: {**state, "blocks.0.attn.proj.weight": torch.zeros(32, 32, dtype=torch.int8)},
        r"blocks\.0\.attn\.proj\.weight holds no floats",
    ),
    "one of three projections": (
        lambda state: {key: tensor for key, tensor in separate(state).items() if key != "blocks.1.attn.k_proj.weight"},
        r"blocks\.1\.attn\.qkv\.weight has shape \(64, 32\)",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_another_model_is_refused_with_the_reason(encoder, tmp_path, what):
    alter, sentence = REFUSED[what]
    torch.save(alter(encoder.state_dict()), tmp_path / "source.pt")
    with pytest.raises(UserError, match=rf"source\.pt.*{sentence}"):
        read_eva_clip(tmp_path / "source.pt", CONFIG)
