"""The trained path: that it computes what inference computes, and which parts it teaches."""

import pytest
import torch

from lavit_dist.models.autoencoder import FeatureAutoencoder
from lavit_dist.models.selector import gumbel_noise, select_some
from lavit_dist.models.tokenizer_losses import reconstruction_error
from tests.small_tokenizer import SMALL

PATCHES, WIDTH = SMALL.encoder.num_patches, SMALL.encoder.width


def noise(seed: int, batch: int = 3) -> torch.Tensor:
    return gumbel_noise((batch, PATCHES, 2), torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model(tokenizer):
    return FeatureAutoencoder(tokenizer)


def both_paths(model: FeatureAutoencoder, features: torch.Tensor, seed: int, *, quantize: bool):
    keep_mask = select_some(model.selector(features), noise(seed, len(features)))
    return (
        model(features, gumbel_noise=noise(seed, len(features)), quantize=quantize),
        model(features, keep_mask=keep_mask, quantize=quantize),
    )


@pytest.mark.parametrize("seed", range(5))
def test_both_training_paths_reconstruct_what_inference_reconstructs(tokenizer, model, seed):
    features = tokenizer.encode(torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))
    tokenized = tokenizer.tokenize_features(features, noise(seed))
    reconstructed = tokenizer.reconstruct(tokenized.codes)
    for out in both_paths(model, features, seed, quantize=True):
        assert torch.equal(tokenized.keep_mask, out.keep_mask > 0)
        assert torch.equal(torch.cat(tokenized.codes), out.quantized.codes)
        torch.testing.assert_close(reconstructed, out.features, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("quantize", [False, True])
def test_the_reconstruction_teaches_every_part(tokenizer, model, quantize):
    features = torch.randn(3, PATCHES, WIDTH)
    masked, kept = both_paths(model, features, 1, quantize=quantize)
    taught = {}
    for name, out in (("masked", masked), ("kept", kept)):
        tokenizer.zero_grad()
        reconstruction_error(features, out.features).mean().backward()
        parts = ("selector", "merger", "projection", "decoder")
        taught[name] = {
            part
            for part in parts
            if all(
                p.grad is not None and p.grad.abs().sum() > 0
                for key, p in model.part(part).named_parameters()
                if p.dim() > 1 and "unet_proj" not in key
            )
        }
        assert tokenizer.quantizer.embedding.weight.grad is None
    assert taught == {"masked": {"selector", "merger", "projection", "decoder"}, "kept": {"merger", "projection", "decoder"}}


def test_both_paths_give_the_other_parts_the_same_gradient(tokenizer, model):
    features = torch.randn(3, PATCHES, WIDTH)
    gradients = []
    for out in both_paths(model, features, 2, quantize=False):
        tokenizer.zero_grad()
        reconstruction_error(features, out.features).mean().backward()
        gradients.append([p.grad.clone() for p in model.part("merger").parameters() if p.grad is not None])
    for masked, kept in zip(*gradients, strict=True):
        torch.testing.assert_close(masked, kept, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("kept", ["one", "all"])
def test_images_that_keep_one_or_all_patches_are_reconstructed_finitely(model, kept):
    features = torch.randn(2, PATCHES, WIDTH)
    keep_mask = torch.ones(2, PATCHES, dtype=torch.bool)
    if kept == "one":
        keep_mask[:, 1:] = False
    out = model(features, keep_mask=keep_mask, quantize=True, with_log_probs=True)
    assert out.features.isfinite().all()
    assert out.log_probs.shape == (2, PATCHES, 2)
    assert len(out.unit) == keep_mask.sum()
