"""The merger on kept patches alone computes what the masked, released form computes at their positions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.config.model import MergerConfig
from lavit_dist.models.merger import TokenMerger

BATCH = 3
KEPT = st.sampled_from(["some", "none", "all", "one"])


def make_merger(heads: int, head_width: int, layers: int, seed: int = 0) -> TokenMerger:
    """A merger whose layers all matter: weights of the scale of the reference vectors', attention scores of a spread of about 0.5."""
    width = heads * head_width
    merger = TokenMerger(width, MergerConfig(layers=layers, heads=heads, mlp_hidden=3 * width + 1))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in merger.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(
                0.7 * parameter.shape[1] ** -0.5 * noise if parameter.dim() > 1 else name.endswith("weight") + 0.1 * noise
            )
    return merger


def make_mask(kept: list[str], patches: int, seed: int = 0) -> torch.Tensor:
    """A keep mask [batch, patch] of bools, of images of which some, none, all or one of the patches are kept."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(len(kept), patches, generator=generator) < 1 / 3
    for image, how in enumerate(kept):
        if how != "some":
            mask[image] = how == "all"
        if how == "one":
            mask[image, torch.randint(patches, (), generator=generator)] = True
    return mask


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item() if len(expected) else 0.0


@given(
    heads=st.integers(1, 4),
    head_width=st.sampled_from([4, 12, 22, 88]),
    layers=st.integers(1, 4),
    patches=st.sampled_from([1, 4, 16, 49]),
    kept=st.lists(KEPT, min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_kept_only_is_the_masked_form_at_kept_patches(heads, head_width, layers, patches, kept, seed):
    merger = make_merger(heads, head_width, layers, seed)
    features = 2 * torch.randn(len(kept), patches, heads * head_width, generator=torch.Generator().manual_seed(seed))
    mask = make_mask(kept, patches, seed)
    with torch.no_grad():
        assert relative(merger.merge_kept(features, mask), merger(features, mask.float())[mask]) <= 1e-5


@pytest.mark.parametrize("kept", [["some", "all", "one"], ["none", "some", "some"]])
def test_gradients_are_those_of_the_masked_form(kept):
    merger = make_merger(heads=2, head_width=12, layers=2)
    features = torch.randn(BATCH, 16, 24, generator=torch.Generator().manual_seed(1), requires_grad=True)
    mask = make_mask(kept, 16)
    weights = torch.randn(int(mask.sum()), 24, generator=torch.Generator().manual_seed(2))
    parameters = [features, *merger.parameters()]
    ours = torch.autograd.grad((merger.merge_kept(features, mask) * weights).sum(), parameters)
    theirs = torch.autograd.grad((merger(features, mask.float())[mask] * weights).sum(), parameters)
    for name, one, other in zip(["features", *dict(merger.named_parameters())], ours, theirs, strict=True):
        # A key's bias shifts all scores of a query alike: its gradient is rounding alone.
        if not name.endswith("key.bias"):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_cross_attention_is_exact_where_a_kept_patch_has_by_far_the_largest_score():
    merger = make_merger(heads=2, head_width=12, layers=1)
    features = torch.randn(1, 16, 24, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True
    with torch.no_grad():
        merger.blocks[0].token_cross_attn.query.weight.mul_(40)
        assert relative(merger.merge_kept(features, mask), merger(features, mask.float())[mask]) <= 1e-5


def test_nothing_kept_is_no_token():
    merger = make_merger(heads=2, head_width=4, layers=1)
    assert merger.merge_kept(torch.randn(2, 9, 8), torch.zeros(2, 9, dtype=torch.bool)).shape == (0, 8)
