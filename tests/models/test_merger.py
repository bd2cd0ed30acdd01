"""The merger on kept patches alone computes what the masked, released form computes at their positions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.config.model import MergerConfig
from lavit_dist.models.attention import POLICY_EPS, masked_softmax
from lavit_dist.models.kept_attention import attention_among_kept
from lavit_dist.models.merger import TokenMerger

BATCH = 3
KEPT = st.sampled_from(["some", "none", "all", "one"])


def make_merger(heads: int, head_width: int, layers: int, seed: int = 0) -> TokenMerger:
    """A merger whose layers all matter, with self-attention scores close together, as the stated bound asks for 1e-5."""
    width = heads * head_width
    merger = TokenMerger(width, MergerConfig(layers=layers, heads=heads, mlp_hidden=3 * width + 1))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in merger.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(name.endswith("weight") + 0.1 * noise)
            else:
                parameter.copy_(0.7 * parameter.shape[1] ** -0.5 * noise)
            if name.endswith("qkv.weight"):
                parameter[:width] *= 0.3
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
    head_width=st.sampled_from([8, 12, 22, 88]),
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


@given(st.integers(0, 2**31), st.floats(0.1, 8))
def test_self_attention_differs_by_no_more_than_stated(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 20, 2, 8, dtype=torch.float64, generator=generator)
    kept = torch.rand(20, generator=generator) < 0.4
    kept[3] = True
    query = scale * query
    scores = (query.transpose(0, 1) @ key.permute(1, 2, 0)).float() * 8**-0.5
    attended = kept.expand(20, 20).tril()
    released = masked_softmax(scores, attended.float()).double() @ value.transpose(0, 1)
    ours = attention_among_kept(query[kept], key[kept], value[kept], [int(kept.sum())])
    gap = scores.amax(-1) - scores.masked_fill(~attended, -torch.inf).amax(-1)
    share = POLICY_EPS / ((-gap).exp() + POLICY_EPS)
    spread = torch.cdist(value.transpose(0, 1), value.transpose(0, 1)).amax((1, 2))
    difference = (ours.transpose(0, 1) - released[:, kept]).norm(dim=-1)
    assert (difference <= (share * spread[:, None])[:, kept] + 1e-5).all()


def test_cross_attention_is_exact_where_a_kept_patch_has_by_far_the_largest_score():
    merger = make_merger(heads=2, head_width=12, layers=1)
    features = torch.randn(1, 16, 24, generator=torch.Generator().manual_seed(3))
    mask = make_mask(["all"], 16)
    mask[0, 5] = False
    attention = merger.blocks[0].token_cross_attn
    with torch.no_grad():
        attention.query.weight.mul_(100)
        expected = merger(features, mask.float())[mask]
        assert relative(merger.merge_kept(features, mask), expected) <= 1e-5
        attention.query.weight.mul_(1e-3)
        assert relative(merger(features, mask.float())[mask], expected) > 1e-3  # the scores did matter


def test_nothing_kept_is_no_token():
    merger = make_merger(heads=2, head_width=4, layers=1)
    assert merger.merge_kept(torch.randn(2, 9, 8), torch.zeros(2, 9, dtype=torch.bool)).shape == (0, 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel runs on GPUs")
@pytest.mark.parametrize("head_width", [64, 88, 12])
def test_the_variable_length_kernel_agrees(head_width):
    merger = make_merger(heads=2, head_width=head_width, layers=2).cuda()
    features = torch.randn(4, 49, 2 * head_width, generator=torch.Generator().manual_seed(0)).cuda()
    mask = make_mask(["some", "all", "one", "none"], 49).cuda()
    with torch.no_grad():
        exact = merger.merge_kept(features, mask)
        assert relative(merger.bfloat16().merge_kept(features.bfloat16(), mask).float(), exact) < 5e-2
