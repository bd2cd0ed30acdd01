"""Scores are means over images, and agree with what inference computes."""

import pytest
import torch

from lavit_dist.evaluation.tokenizer_scores import score_tokenizer
from lavit_dist.models.initialisation import initialise
from lavit_dist.models.selector import keyed_gumbel_noise
from lavit_dist.models.tokenizer_losses import reconstruction_error
from lavit_dist.models.visual_tokenizer import VisualTokenizer
from tests.small_tokenizer import SMALL


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    tokenizer = VisualTokenizer(SMALL)
    initialise(tokenizer)
    return tokenizer


def batches(count: int) -> list[tuple[list[str], torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        ([f"{number}/{place}" for place in range(4)], torch.randn(4, 3, 32, 32, generator=generator)) for number in range(count)
    ]


def test_scores_are_those_of_inference(tokenizer):
    keys, pixels = batches(1)[0]
    scores = score_tokenizer(tokenizer, [(keys, pixels)], seed=3)
    features = tokenizer.encode(pixels)
    tokenized = tokenizer.tokenize_features(features, keyed_gumbel_noise(keys, SMALL.encoder.num_patches, 3))
    error = reconstruction_error(features, tokenizer.reconstruct(tokenized.codes)).mean().item()
    assert scores.reconstruction_loss == pytest.approx(error, rel=1e-3)
    assert scores.tokens_by_key == {key: len(codes) for key, codes in zip(keys, tokenized.codes, strict=True)}
    assert scores.keep_ratio == pytest.approx(tokenized.keep_mask.float().mean().item())
    assert scores.codes_used == pytest.approx(len(torch.cat(tokenized.codes).unique()) / SMALL.codebook.size)


def test_images_that_come_again_or_in_other_batches_change_no_mean(tokenizer):
    whole = batches(3)
    once, twice = score_tokenizer(tokenizer, whole), score_tokenizer(tokenizer, whole * 2)
    one_by_one = score_tokenizer(
        tokenizer, [([key], pixels[None]) for keys, batch in whole for key, pixels in zip(keys, batch, strict=True)]
    )
    assert (once.images, twice.images, one_by_one.images) == (12, 24, 12)
    for other in (twice, one_by_one):
        for name in ("reconstruction_loss", "continuous_reconstruction_loss", "keep_ratio", "perplexity"):
            assert getattr(other, name) == pytest.approx(getattr(once, name), rel=1e-4)
