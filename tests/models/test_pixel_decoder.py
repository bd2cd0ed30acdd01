"""The pixel decoder: latents that come back, a condition that can be dropped, a start that is the identity."""

import pytest
import torch
from diffusers import AutoencoderKL

from lavit_dist.config.base import build
from lavit_dist.config.model import PixelDecoderConfig
from lavit_dist.errors import UserError
from lavit_dist.models.pixel_decoder import PixelDecoder, PixelFolding, VaeLatents, build_unet, over_the_image

SMALL = {
    "block_out_channels": (32, 32),
    "cross_attention": (True, True),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "latent": "pixel_unshuffle",
    "latent_factor": 2,
    "latent_channels": 12,
}


def make_decoder(**changes) -> PixelDecoder:
    torch.manual_seed(0)
    config = build(PixelDecoderConfig, SMALL | changes)
    return PixelDecoder(config, build_unet(config, latent_size=8, condition_dim=16), torch.nn.Linear(24, 16))


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_folded_pixels_come_back(factor):
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    folding = PixelFolding(factor)
    latents = folding.encode(pixels)
    assert latents.shape == (2, 3 * factor**2, 16 // factor, 16 // factor)
    assert torch.equal(folding.decode(latents), pixels)


def test_vae_latents_have_the_scale_of_the_autoencoder():
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.5,
    )
    latents = VaeLatents(vae)
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    encoded = latents.encode(pixels)
    assert encoded.shape == (1, 4, 16 // latents.factor, 16 // latents.factor)
    torch.testing.assert_close(encoded, vae.encode(pixels).latent_dist.mode() * 0.5)
    assert latents.decode(encoded).shape == pixels.shape


def test_a_dropped_condition_is_zeros_whatever_the_features():
    decoder = make_decoder()
    condition = decoder.condition(torch.randn(3, 5, 24), torch.tensor([True, False, True]))
    assert not condition[[0, 2]].any()
    assert condition[1].all()


def test_the_prediction_follows_the_condition_and_the_timestep():
    decoder = make_decoder()
    noisy, timesteps = torch.randn(1, 12, 8, 8), torch.tensor([10])
    condition = decoder.condition(torch.randn(1, 5, 24))
    predicted = decoder(noisy, timesteps, condition)
    assert predicted.shape == noisy.shape
    assert not torch.allclose(predicted, decoder(noisy, timesteps, torch.zeros_like(condition)))
    assert not torch.allclose(predicted, decoder(noisy, timesteps + 500, condition))


def test_bf16_products_return_fp32_close_to_fp32_ones():
    decoder = make_decoder()
    noisy, timesteps, condition = torch.randn(2, 12, 8, 8), torch.tensor([3, 900]), torch.randn(2, 5, 16)
    exact = decoder(noisy, timesteps, condition)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = decoder(noisy, timesteps, condition)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.05)


def test_a_condition_lies_over_its_patches():
    condition = torch.arange(4.0).view(1, 4, 1)
    assert over_the_image(condition, 4)[0, 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"latent_channels": 4}, "latent_channels"),
        ({"cross_attention": (True,)}, "cross_attention"),
        ({"prediction_type": "velocity"}, "prediction_type"),
        ({"norm_num_groups": 7}, "norm_num_groups"),
        ({"latent": "vae", "latent_channels": 4}, "vae"),
    ],
)
def test_contradicting_sizes_are_refused_by_name(changes, named):
    with pytest.raises(UserError, match=named):
        build(PixelDecoderConfig, SMALL | changes)
