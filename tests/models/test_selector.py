"""Selection: hard forward, soft backward, never nothing, and as many patches as asked for."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lavit_dist.models.selector import KEEP, TokenSelector, gumbel_noise, select, select_some, select_straight_through

PATCHES = 16
seeds = st.integers(0, 2**31)


def draw(seed: int, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    """Log-probabilities [batch, patch, 2], noise of that shape, and the generator they came from."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, PATCHES, 2)
    return F.log_softmax(torch.randn(shape, generator=generator), -1), gumbel_noise(shape, generator), generator


@given(seeds, st.floats(0.5, 5))
@settings(max_examples=25, deadline=None)
def test_straight_through_selection_is_hard_forward_and_soft_backward(seed, temperature):
    log_probs, noise, _ = draw(seed, batch=2)
    log_probs.requires_grad_()
    mask = select_straight_through(log_probs, noise, temperature)
    assert torch.equal(mask > 0.5, select_some(log_probs, noise))
    assert ((mask - mask.round()).abs() < 1e-6).all()
    mask.sum().backward()
    assert (log_probs.grad[..., 0] >= 0).all()
    assert (log_probs.grad[..., 1] <= 0).all()
    assert log_probs.grad[..., 0].sum() > 0


@given(seeds, st.floats(-30, 3))
@settings(max_examples=25, deadline=None)
def test_an_image_keeps_what_is_selected_or_else_its_best_patch(seed, shift):
    log_probs, noise, _ = draw(seed, batch=4)
    log_probs[..., KEEP] += shift
    plain, some = select(log_probs, noise), select_some(log_probs, noise)
    for image in range(4):
        if plain[image].any():
            assert torch.equal(some[image], plain[image])
        else:
            scores = log_probs[image] + noise[image]
            assert some[image].nonzero().tolist() == [[(scores[:, KEEP] - scores[:, 1 - KEEP]).argmax().item()]]


@given(seeds, st.floats(0.05, 0.9), st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_calibrated_selector_keeps_the_share_that_is_asked_for(seed, share, sampled):
    torch.manual_seed(seed)
    selector = TokenSelector(16)
    features = 3 * torch.randn(40, PATCHES, 16)
    with torch.no_grad():
        before = selector(features)
        selector.calibrate(before, share, sampled=sampled)
        after = selector(features)
    kept = after[..., KEEP].exp() if sampled else select(after, None).float()
    assert kept.mean().item() == pytest.approx(share, abs=3e-3)
    order = (before[..., KEEP] - before[..., 1 - KEEP]).flatten().argsort()
    assert (((after[..., KEEP] - after[..., 1 - KEEP]).flatten()[order]).diff() >= -1e-5).all()


def test_scores_are_those_of_fp32_under_autocast():
    torch.manual_seed(0)
    selector, features = TokenSelector(16), torch.randn(3, PATCHES, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(selector(features), selector(features.clone()))
        under = selector(features)
    assert under.dtype == torch.float32
    assert torch.equal(under, selector(features))
