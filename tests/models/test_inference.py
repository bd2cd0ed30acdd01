"""A frozen tokenizer computes what the one that it was made from computes, and each image by itself."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.config.model import (
    CodebookConfig,
    MergerConfig,
    TokenizerDecoderConfig,
    VisionEncoderConfig,
    VisualTokenizerConfig,
)
from lavit_dist.errors import UserError
from lavit_dist.models.frozen_linear import FrozenLinear, has_bf16_layers
from lavit_dist.models.inference import freeze_for_inference
from lavit_dist.models.initialisation import initialise
from lavit_dist.models.quantizer import VECTORS_AT_A_TIME
from lavit_dist.models.selector import keyed_gumbel_noise
from lavit_dist.models.visual_tokenizer import VisualTokenizer

WIDTH, PATCHES, IMAGES = 48, 16, 7
CONFIG = VisualTokenizerConfig(
    encoder=VisionEncoderConfig(image_size=32, patch_size=8, width=WIDTH, layers=2, head_width=12, mlp_hidden=100, head_out=16),
    merger=MergerConfig(layers=2, heads=4, mlp_hidden=100),
    codebook=CodebookConfig(size=64, dim=8),
    decoder=TokenizerDecoderConfig(depth=1, heads=4, mlp_hidden=64, unet_dim=16),
)
bf16_only = pytest.mark.skipif(not has_bf16_layers(), reason="this CPU has no AVX-512")


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    tokenizer = VisualTokenizer(CONFIG)
    initialise(tokenizer)
    for attention in (block.attn for block in tokenizer.encoder.blocks):
        torch.nn.init.normal_(attention.q_bias)
        torch.nn.init.normal_(attention.v_bias)
    return tokenizer.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def noise():
    return keyed_gumbel_noise([str(image) for image in range(IMAGES)], PATCHES, seed=0)


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def test_the_masked_and_the_kept_only_form_give_the_same_ids(tokenizer, pixels, noise):
    features = tokenizer.encode(pixels)
    kept, masked = (tokenizer.tokenize_features(features, noise, masked=masked) for masked in (False, True))
    assert torch.equal(kept.keep_mask, masked.keep_mask)
    assert torch.equal(torch.cat(kept.codes), torch.cat(masked.codes))


@pytest.mark.parametrize("compile_blocks", [False, pytest.param(True, marks=pytest.mark.timeout(240))])
def test_in_fp32_a_frozen_tokenizer_is_the_same(tokenizer, pixels, noise, compile_blocks):
    frozen = freeze_for_inference(copy.deepcopy(tokenizer), compile_blocks=compile_blocks)
    with torch.inference_mode():
        features = tokenizer.encode(pixels)
        assert difference(frozen.encode(pixels), features) <= 1e-5
        expected = tokenizer.tokenize(pixels, noise)
        for images in (slice(0, IMAGES), slice(1, 3)):
            tokenized = frozen.tokenize(pixels[images], noise[images])
            assert torch.equal(tokenized.keep_mask, expected.keep_mask[images])
            assert torch.equal(torch.cat(tokenized.codes), torch.cat(expected.codes[images]))
        assert difference(frozen.reconstruct(expected.codes), tokenizer.reconstruct(expected.codes)) <= 1e-5


@bf16_only
def test_in_bf16_it_is_near_and_selects_in_fp32(tokenizer, pixels, noise):
    frozen = freeze_for_inference(copy.deepcopy(tokenizer), dtype=torch.bfloat16)
    features = frozen.encode(pixels)
    assert features.dtype == torch.float32  # the residual sums
    assert difference(features, tokenizer.encode(pixels)) < 0.02
    assert difference(frozen.selector(features), tokenizer.selector(features)) <= 1e-5
    keep_mask = tokenizer.tokenize(pixels, noise).keep_mask
    merged = frozen.merger.merge_kept(features, keep_mask)
    assert difference(merged, tokenizer.merger.merge_kept(features, keep_mask)) < 0.05
    codes = [torch.arange(5), torch.arange(2)]
    assert difference(frozen.reconstruct(codes), tokenizer.reconstruct(codes)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=bf16_only)])
def test_what_an_image_becomes_is_the_same_to_the_bit_in_any_batch(tokenizer, pixels, noise, dtype):
    frozen = freeze_for_inference(copy.deepcopy(tokenizer), dtype=dtype)
    features, tokenized = frozen.encode(pixels), frozen.tokenize(pixels, noise)
    merged = frozen.merger.merge_kept(features, tokenized.keep_mask).split(tokenized.keep_mask.sum(-1).tolist())
    for batch in ([3], [6, 0, 2], [5, 4]):
        assert torch.equal(frozen.encode(pixels[batch]), features[batch])
        again = frozen.tokenize(pixels[batch], noise[batch])
        together = torch.cat([merged[image] for image in batch])
        assert torch.equal(frozen.merger.merge_kept(features[batch], again.keep_mask), together)
        assert all(torch.equal(again.codes[place], tokenized.codes[image]) for place, image in enumerate(batch))


@given(st.integers(0, 3000), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.integers(0, 2**31))
def test_a_frozen_layer_is_the_layer(rows, width, out, bias, seed):
    torch.manual_seed(seed)
    layer = torch.nn.Linear(width, out, bias=bias)
    x = torch.randn(rows, width)
    frozen = FrozenLinear(layer.weight, layer.bias, torch.float32)
    activated = FrozenLinear(layer.weight, layer.bias, torch.float32, "gelu")
    torch.testing.assert_close(frozen(x), layer(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(activated(x), torch.nn.functional.gelu(layer(x)), rtol=1e-5, atol=1e-5)


def test_a_precision_that_is_none_is_refused(tokenizer):
    with pytest.raises(UserError, match="fp32 or bf16"):
        freeze_for_inference(copy.deepcopy(tokenizer), dtype=torch.float16)


def test_compiling_without_a_compiler_is_refused(repo_root, tmp_path):
    program = """
import torch
from lavit_dist.errors import UserError
from lavit_dist.models.inference import freeze_for_inference
from tests.models.test_inference import CONFIG, VisualTokenizer
try:
    freeze_for_inference(VisualTokenizer(CONFIG), compile_blocks=True)
except UserError as error:
    print("refused:", error)
"""
    environment = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=repo_root, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("refused: compile is on")
    assert len(done.stdout.splitlines()) == 1
    assert "turn compile off" in done.stdout


@pytest.mark.parametrize("count", [0, 1, VECTORS_AT_A_TIME, 2 * VECTORS_AT_A_TIME + 3])
def test_codes_of_any_number_of_vectors_are_the_nearest(tokenizer, count):
    unit = torch.nn.functional.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    codebook = tokenizer.quantizer.embedding.weight
    assert torch.equal(tokenizer.quantizer.assign(unit), torch.cdist(unit, codebook).argmin(-1))
