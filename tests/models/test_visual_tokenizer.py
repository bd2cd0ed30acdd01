"""The tokenizer's parts: what is kept, what flows, and that training and inference compute the same thing."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lavit_dist.config.model import (
    CodebookConfig,
    MergerConfig,
    TokenizerDecoderConfig,
    VisionEncoderConfig,
    VisualTokenizerConfig,
)
from lavit_dist.models.initialisation import initialise
from lavit_dist.models.merger import TokenMerger
from lavit_dist.models.quantizer import VectorQuantizer, spherical_kmeans
from lavit_dist.models.selector import TokenSelector, gumbel_noise, keyed_gumbel_noise, select, select_straight_through
from lavit_dist.models.tokenizer_losses import guidance_loss, rate_loss, reconstruction_loss
from lavit_dist.models.visual_tokenizer import Reconstruction, VisualTokenizer

PATCHES, WIDTH = 16, 32
CONFIG = VisualTokenizerConfig(
    encoder=VisionEncoderConfig(image_size=32, patch_size=8, width=WIDTH, layers=2, head_width=8, mlp_hidden=64, head_out=16),
    merger=MergerConfig(layers=2, heads=4, mlp_hidden=64),
    codebook=CodebookConfig(size=24, dim=8),
    decoder=TokenizerDecoderConfig(depth=2, heads=4, mlp_hidden=64, unet_dim=16),
)


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    tokenizer = VisualTokenizer(CONFIG)
    initialise(tokenizer)
    return tokenizer


def noise(seed: int, batch: int = 3) -> torch.Tensor:
    return gumbel_noise((batch, PATCHES, 2), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(5))
def test_training_reconstructs_what_inference_reconstructs(tokenizer, seed):
    features = tokenizer.encode(torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))
    trained = tokenizer(features, noise(seed), temperature=1.0, quantize=True)
    tokenized = tokenizer.tokenize_features(features, noise(seed))
    assert torch.equal(tokenized.keep_mask, trained.keep_mask > 0)
    assert torch.equal(torch.cat(tokenized.codes), trained.quantized.codes)
    torch.testing.assert_close(tokenizer.reconstruct(tokenized.codes), trained.features, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("quantize", [False, True])
def test_the_reconstruction_teaches_every_part(tokenizer, quantize):
    features = torch.randn(3, PATCHES, WIDTH)
    out = tokenizer(features, noise(1), temperature=1.0, quantize=quantize)
    tokenizer.zero_grad()
    reconstruction_loss(features, out.features).backward()
    for part in (tokenizer.selector, tokenizer.merger, tokenizer.tokenizer_encoder.encode_task_layer, tokenizer.decoder.blocks):
        assert all(
            parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in part.parameters() if parameter.dim() > 1
        )
    assert tokenizer.quantizer.embedding.weight.grad is None


def test_an_image_has_the_same_codes_in_any_company(tokenizer):
    pixels = torch.randn(4, 3, 32, 32)
    keys = ["a", "b", "c", "d"]
    together = tokenizer.tokenize(pixels, keyed_gumbel_noise(keys, PATCHES, seed=3))
    for index in (3, 1):
        alone = tokenizer.tokenize(pixels[index : index + 1], keyed_gumbel_noise([keys[index]], PATCHES, seed=3))
        assert torch.equal(alone.codes[0], together.codes[index])


def test_an_image_never_has_no_code(tokenizer):
    drop_all = torch.zeros(2, PATCHES, 2)
    drop_all[..., 1] = 1e6
    assert [len(codes) for codes in tokenizer.tokenize(torch.randn(2, 3, 32, 32), drop_all).codes] == [1, 1]


@given(st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_the_merger_is_causal_over_kept_patches(seed):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(0)
    merger = TokenMerger(WIDTH, CONFIG.merger)
    features = torch.randn(1, PATCHES, WIDTH, generator=generator)
    kept = torch.rand(1, PATCHES, generator=generator) < 0.5
    changed = int(torch.randint(PATCHES, (), generator=generator))
    kept[0, changed] = True
    other = features.clone()
    other[0, changed] += torch.randn(WIDTH, generator=generator)
    before, after = merger(features, kept.float()), merger(other, kept.float())
    same = (before - after).abs().amax(-1)[0] < 1e-4
    assert same[:changed][kept[0, :changed]].all()
    assert not same[changed]


@given(st.integers(0, 2**31), st.floats(0.5, 5))
@settings(max_examples=25, deadline=None)
def test_straight_through_selection_is_hard_forward_and_soft_backward(seed, temperature):
    log_probs = F.log_softmax(torch.randn(2, PATCHES, 2, generator=torch.Generator().manual_seed(seed)), -1).requires_grad_()
    mask = select_straight_through(log_probs, noise(seed, batch=2), temperature)
    assert torch.equal(mask > 0.5, select(log_probs, noise(seed, batch=2)))
    assert ((mask - mask.round()).abs() < 1e-6).all()
    mask.sum().backward()
    assert (log_probs.grad[..., 0] >= 0).all()
    assert (log_probs.grad[..., 1] <= 0).all()
    assert log_probs.grad[..., 0].sum() > 0


def test_the_rate_may_differ_between_images_but_not_on_average():
    uneven = torch.cat([torch.ones(1, 8), torch.zeros(2, 8)])
    assert rate_loss(uneven.mean(), 1 / 3).item() == pytest.approx(0, abs=1e-12)
    assert rate_loss(torch.ones(3, 8).mean(), 1 / 3).item() == pytest.approx(4 / 9)


@given(st.integers(0, 2**31), st.floats(0.1, 0.9))
@settings(max_examples=25, deadline=None)
def test_guidance_asks_for_the_dropped_patches_that_came_back_worst(seed, share):
    generator = torch.Generator().manual_seed(seed)
    target, features = torch.randn(2, 3, PATCHES, 8, generator=generator)
    log_probs = F.log_softmax(torch.randn(3, PATCHES, 2, generator=generator), -1).requires_grad_()
    mask = (torch.rand(3, PATCHES, generator=generator) < 0.4).float()
    guidance_loss(target, Reconstruction(features, log_probs, mask, features[mask > 0], None), share).backward()
    asked = log_probs.grad[..., 0] < 0  # descent raises these patches' keep probability
    assert not asked[mask > 0].any()
    assert (log_probs.grad[mask > 0] == 0).all()
    dropped = int((mask == 0).sum())
    assert asked.sum() == pytest.approx(share * dropped, abs=1)
    error = 1 - F.cosine_similarity(target, features, dim=-1)
    others = error[(mask == 0) & ~asked]
    assert not asked.any() or not len(others) or error[asked].min() >= others.max()


@pytest.mark.parametrize("ratio", [0.2, 0.7])
def test_patches_kept_at_random_follow_the_ratio_and_not_the_selector(tokenizer, ratio):
    features = torch.randn(60, PATCHES, WIDTH)
    out = tokenizer(features, noise(2, batch=60), temperature=1.0, quantize=False, random_keep_ratio=ratio)
    assert out.keep_mask.mean().item() == pytest.approx(ratio, abs=0.05)
    assert not out.keep_mask.requires_grad
    assert out.log_probs.requires_grad


def test_guidance_of_images_kept_whole_is_nothing():
    log_probs = F.log_softmax(torch.randn(2, PATCHES, 2), -1)
    features = torch.randn(2, PATCHES, 8)
    whole = Reconstruction(features, log_probs, torch.ones(2, PATCHES), features.flatten(0, 1), None)
    assert guidance_loss(features, whole, 1 / 3) == 0


@given(st.integers(0, 2**31), st.floats(0.05, 0.9))
@settings(max_examples=25, deadline=None)
def test_a_calibrated_selector_keeps_the_share_that_is_asked_for(seed, share):
    generator = torch.Generator().manual_seed(seed)
    selector = TokenSelector(16)
    features = 3 * torch.randn(40, PATCHES, 16, generator=generator)
    with torch.no_grad():
        before = selector(features)
        selector.calibrate(before, share)
        after = selector(features)
    assert after[..., 0].exp().mean().item() == pytest.approx(share, abs=1e-3)
    order = (before[..., 0] - before[..., 1]).flatten().argsort()
    assert (((after[..., 0] - after[..., 1]).flatten()[order]).diff() >= -1e-5).all()


@given(st.integers(0, 2**31), st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_statistics_of_shards_sum_to_those_of_the_whole(seed, cut):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(CONFIG.codebook)
    vectors = torch.randn(41, 8, generator=torch.Generator().manual_seed(seed))
    counts, sums = quantizer.statistics(quantizer(vectors))
    left, right = (quantizer.statistics(quantizer(part)) for part in (vectors[:cut], vectors[cut:]))
    torch.testing.assert_close(counts, left[0] + right[0])
    torch.testing.assert_close(sums, left[1] + right[1])


def test_the_codebook_stays_of_unit_length_and_dead_codes_come_back():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(CONFIG.codebook)
    vectors = F.normalize(torch.randn(500, 8), dim=-1)
    quantizer.embedding.weight[:] = F.normalize(torch.ones(8), dim=0)  # collapsed: every vector goes to code 0
    for _ in range(60):
        quantized = quantizer(vectors)
        quantizer.update(*quantizer.statistics(quantized), vectors[torch.randperm(500)][:24])
    torch.testing.assert_close(quantizer.embedding.weight.norm(dim=-1), torch.ones(24))
    assert len(quantizer(vectors).codes.unique()) >= 0.9 * CONFIG.codebook.size


@pytest.mark.parametrize("count", [200, 24, 5])
def test_kmeans_centres_are_unit_and_distinct(count):
    unit = F.normalize(torch.randn(count, 8), dim=-1)
    centres, counts = spherical_kmeans(unit, 24, torch.Generator().manual_seed(0), iterations=5)
    assert centres.shape == (24, 8)
    torch.testing.assert_close(centres.norm(dim=-1), torch.ones(24))
    assert len(centres.unique(dim=0)) == 24
    assert counts.sum() == count
