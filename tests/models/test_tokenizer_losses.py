"""The losses: what they are zero at, and that parts of a batch give the gradient of the whole."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lavit_dist.config.tokenizer import RateConfig
from lavit_dist.models.tokenizer_losses import (
    codebook_loss,
    commitment_loss,
    error_quantile,
    guidance_loss,
    likeness_loss,
    rate_loss,
    reconstruction_error,
)

PATCHES = 16
seeds = st.integers(0, 2**31)


def test_images_may_differ_in_rate_but_not_on_average():
    uneven = torch.cat([torch.ones(1, 8), torch.zeros(2, 8)])
    rate = RateConfig(keep_ratio=1 / 3)
    assert rate_loss(uneven, uneven.mean().item(), rate).item() == pytest.approx(0, abs=1e-12)
    assert rate_loss(torch.ones(3, 8), 1.0, rate).item() == pytest.approx(4 / 9)
    assert rate_loss(uneven, uneven.mean().item(), RateConfig(keep_ratio=1 / 3, per="image")).item() == pytest.approx(
        (4 / 9 + 2 / 9) / 3
    )


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_a_range_leaves_images_free_within_it(seed):
    mask = torch.rand(6, PATCHES, generator=torch.Generator().manual_seed(seed))
    rate = RateConfig(keep_ratio=0.5, per="range", lowest=0.1, highest=0.9)
    assert rate_loss(mask, mask.mean().item(), rate).item() == pytest.approx((mask.mean() - 0.5).square().item(), abs=1e-7)
    assert rate_loss(torch.ones(6, PATCHES), 0.5, rate).item() == pytest.approx(0.1**2)


@given(seeds, st.sampled_from(["batch", "image", "range"]), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_the_rate_of_parts_has_the_gradient_of_the_whole(seed, per, parts):
    rate = RateConfig(keep_ratio=0.4, per=per, lowest=0.3, highest=0.6)
    whole = torch.rand(12, PATCHES, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    rate_loss(whole, whole.mean().item(), rate).backward()
    cut = whole.detach().clone().requires_grad_()
    losses = [rate_loss(part, whole.mean().item(), rate) for part in cut.chunk(parts)]
    (sum(loss * len(part) for loss, part in zip(losses, cut.chunk(parts), strict=True)) / 12).backward()
    torch.testing.assert_close(cut.grad, whole.grad)


@given(seeds, st.floats(0.1, 0.9))
@settings(max_examples=25, deadline=None)
def test_guidance_asks_for_the_dropped_patches_that_came_back_worst(seed, share):
    generator = torch.Generator().manual_seed(seed)
    target, features = torch.randn(2, 3, PATCHES, 8, generator=generator)
    log_probs = F.log_softmax(torch.randn(3, PATCHES, 2, generator=generator), -1).requires_grad_()
    keep_mask = torch.rand(3, PATCHES, generator=generator) < 0.4
    error = reconstruction_error(target, features)
    guidance_loss(error, keep_mask, log_probs, error_quantile(error[~keep_mask], share), 9.0).backward()
    asked = log_probs.grad[..., 0] < 0  # descent raises these patches' keep probability
    assert (log_probs.grad[keep_mask] == 0).all()
    assert asked.sum().item() == pytest.approx(share * (~keep_mask).sum().item(), abs=1.01)
    others = error[~keep_mask & ~asked]
    assert not asked.any() or not len(others) or error[asked].min() >= others.max()


def test_guidance_of_images_kept_whole_is_nothing():
    log_probs = F.log_softmax(torch.randn(2, PATCHES, 2), -1)
    assert guidance_loss(torch.rand(2, PATCHES), torch.ones(2, PATCHES, dtype=torch.bool), log_probs, 0.5, 0.0) == 0


@given(seeds, st.floats(0.01, 0.99))
@settings(max_examples=50, deadline=None)
def test_the_quantile_has_that_share_above_it(seed, share):
    errors = torch.rand(101, generator=torch.Generator().manual_seed(seed))
    assert (errors > error_quantile(errors, share)).float().mean().item() == pytest.approx(share, abs=0.011)


@given(seeds, st.lists(st.integers(1, 6), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_likeness_is_the_mean_cosine_of_two_tokens_of_an_image(seed, lengths):
    unit = F.normalize(torch.randn(sum(lengths), 4, generator=torch.Generator().manual_seed(seed)), dim=-1)
    expected = []
    for vectors in unit.split(lengths):
        cosines = vectors @ vectors.t()
        others = ~torch.eye(len(vectors), dtype=torch.bool)
        expected.append(cosines[others].mean().item() if others.any() else 0.0)
    assert likeness_loss(unit, torch.tensor(lengths)).item() == pytest.approx(sum(expected) / len(lengths), abs=1e-6)


def test_commitment_moves_vectors_and_the_codebook_loss_moves_codes():
    unit, codes = (torch.randn(5, 8, requires_grad=True) for _ in range(2))
    committed = torch.autograd.grad(commitment_loss(unit, codes, 5.0), [unit, codes], allow_unused=True)
    learned = torch.autograd.grad(codebook_loss(unit, codes, 5.0), [unit, codes], allow_unused=True)
    assert committed[1] is None
    assert learned[0] is None
    torch.testing.assert_close(committed[0], -learned[1])
