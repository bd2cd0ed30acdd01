"""The tokenizer in use: which patches an image keeps, and the codes that they become."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavit_dist.models.merger import TokenMerger
from lavit_dist.models.selector import keyed_gumbel_noise
from tests.small_tokenizer import SMALL

PATCHES, WIDTH = SMALL.encoder.num_patches, SMALL.encoder.width


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
    merger = TokenMerger(WIDTH, SMALL.merger)
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
