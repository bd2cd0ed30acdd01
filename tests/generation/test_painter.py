"""Painting: guidance as its formula says, the same picture in any batch, and a denoiser that knows the answer finds it."""

import numpy as np
import pytest
import torch

from lavit_dist.checkpoint.pixel_decoding import LoadedDecoder, make_scheduler
from lavit_dist.config.generate import SamplingConfig
from lavit_dist.config.model import (
    CodebookConfig,
    MergerConfig,
    PixelDecoderConfig,
    TokenizerDecoderConfig,
    VisionEncoderConfig,
    VisualTokenizerConfig,
)
from lavit_dist.generation.painter import Painter
from lavit_dist.models.pixel_decoder import PixelDecoder, PixelFolding, build_unet
from lavit_dist.models.visual_tokenizer import VisualTokenizer

SIZES = VisualTokenizerConfig(
    encoder=VisionEncoderConfig(image_size=16, patch_size=4, width=16, layers=1, head_width=8, mlp_hidden=16, head_out=8),
    merger=MergerConfig(layers=1, heads=2, mlp_hidden=16),
    codebook=CodebookConfig(size=12, dim=4),
    decoder=TokenizerDecoderConfig(depth=1, heads=2, mlp_hidden=16, unet_dim=8),
)
CONFIG = PixelDecoderConfig(
    block_out_channels=(16, 16),
    cross_attention=(True, True),
    layers_per_block=1,
    attention_head_dim=2,
    norm_num_groups=4,
    latent="pixel_unshuffle",
    latent_factor=2,
    latent_channels=12,
)


def make_painter(**sampling) -> Painter:
    torch.manual_seed(0)
    tokenizer = VisualTokenizer(SIZES).eval().requires_grad_(False)
    decoder = PixelDecoder(CONFIG, build_unet(CONFIG, 8, 8), tokenizer.decoder.unet_proj).eval().requires_grad_(False)
    loaded = LoadedDecoder(tokenizer, decoder, PixelFolding(2), make_scheduler(CONFIG))
    return Painter(loaded, SamplingConfig(precision="fp32", num_inference_steps=3, **sampling))


@pytest.mark.parametrize("scale", [1.0, 1.7, 4.0])
def test_guidance_follows_its_formula(scale):
    painter = make_painter(decoder_guidance_scale=scale)
    latents, timesteps, condition = torch.randn(2, 12, 8, 8), torch.tensor([5, 700]), torch.randn(2, 16, 8)
    given = painter.decoder(latents, timesteps, condition)
    without = painter.decoder(latents, timesteps, torch.zeros_like(condition))
    torch.testing.assert_close(painter.guided(latents, timesteps, condition), without + scale * (given - without))


def test_a_picture_does_not_depend_on_its_batch():
    codes = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([5, 6, 7, 8, 9])]
    together, alone = (make_painter(batch_size=size).paint(codes, seed=3) for size in (3, 1))
    for first, second in zip(together, alone, strict=True):
        assert first.size == (16, 16)
        assert np.abs(np.asarray(first, int) - np.asarray(second, int)).max() <= 1


def test_of_several_paintings_the_one_most_like_its_features_is_kept():
    codes = [torch.tensor([1, 2, 3]), torch.tensor([4, 5])]
    singles = [make_painter().paint(codes, seed=seed) for seed in (7, 8, 9)]
    painter = make_painter(num_paintings=3)
    kept = painter.paint(codes, seed=7)
    features = painter.tokenizer.reconstruct(codes)
    for index, picture in enumerate(kept):
        candidates = [np.asarray(painted[index]) for painted in singles]
        pixels = torch.tensor(np.stack(candidates)).permute(0, 3, 1, 2) / 127.5 - 1
        best = painter.likeness(pixels, features[index].expand(3, -1, -1)).argmax()
        assert np.array_equal(np.asarray(picture), candidates[best])


def test_a_perfect_prediction_of_the_noise_leads_to_the_image():
    painter = make_painter(decoder_guidance_scale=1.0)
    target = torch.rand(1, 12, 8, 8) * 2 - 1
    shares = painter.scheduler.alphas_cumprod

    def know(latents: torch.Tensor, timesteps: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        signal = shares[timesteps][:, None, None, None]
        return (latents - signal.sqrt() * target) / (1 - signal).sqrt()

    painter.decoder.forward = know
    painted = painter.denoise(torch.randn(1, 12, 8, 8), torch.randn(1, 16, 16))
    torch.testing.assert_close(painted, target, atol=0.02, rtol=0.02)
