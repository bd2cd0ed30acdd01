"""The pixel decoder: a diffusion U-Net that paints an image from reconstructed patch features (section 3.2 and Eq. 5 of the paper)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from lavit_dist.config.model import PixelDecoderConfig


class PixelDecoder(nn.Module):
    """The U-Net and the projection of its condition: what is trained in this stage.

    The condition is `unet_proj` (official key, `tokenizer_decoder.bin`) of the features that the tokenizer's decoder reconstructs.
    """

    def __init__(self, config: PixelDecoderConfig, unet: UNet2DConditionModel, unet_proj: nn.Linear) -> None:
        super().__init__()
        self.config = config
        self.unet = unet
        self.unet_proj = unet_proj

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what is diffused."""
        size = int(self.unet.config["sample_size"])
        return self.config.latent_channels, size, size

    def condition(self, features: Tensor, dropped: Tensor | None = None) -> Tensor:
        """The U-Net's condition [batch, patch, unet_dim] of features [batch, patch, width].

        Zeros, the unconditional condition, where `dropped` [batch] is true.
        """
        condition = self.unet_proj(features)
        return condition if dropped is None else condition.masked_fill(dropped[:, None, None], 0.0)

    def forward(self, noisy: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """What the U-Net predicts (`prediction_type`), fp32, of `noisy` [batch, channel, height, width] at `timesteps` [batch]."""
        if self.config.concatenate_condition:
            noisy = torch.cat([noisy, over_the_image(condition, noisy.shape[-1])], dim=1)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        return self.unet(noisy, timesteps, condition).sample.float()


class PixelFolding:
    """Pixels folded into channels: a lossless latent for images too small to need an autoencoder."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [batch, 3, height, width] in [-1, 1] to [batch, 3 x factor^2, height / factor, width / factor]."""
        return F.pixel_unshuffle(pixels, self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of `encode`, clipped to [-1, 1]."""
        return F.pixel_shuffle(latents, self.factor).clamp(-1, 1)


class VaeLatents:
    """The scaled latents of a frozen autoencoder, as in Stable Diffusion."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        self.channels = int(vae.config["latent_channels"])
        self.scale = float(vae.config["scaling_factor"])

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [batch, 3, height, width] in [-1, 1] to the latents' means, of about unit variance."""
        return self.vae.encode(pixels).latent_dist.mode() * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents back to pixels in [-1, 1]."""
        return self.vae.decode(latents / self.scale).sample.clamp(-1, 1)


Latents = PixelFolding | VaeLatents
"""What turns pixels into what is diffused, and back."""


def build_unet(config: PixelDecoderConfig, latent_size: int, condition_dim: int) -> UNet2DConditionModel:
    """A fresh U-Net over latents [latent_channels, latent_size, latent_size]; with the default sizes, that of Stable Diffusion 1.5."""
    cross = config.cross_attention
    down = tuple("CrossAttnDownBlock2D" if level else "DownBlock2D" for level in cross)
    up = tuple("CrossAttnUpBlock2D" if level else "UpBlock2D" for level in reversed(cross))
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=config.latent_channels + (condition_dim if config.concatenate_condition else 0),
        out_channels=config.latent_channels,
        block_out_channels=config.block_out_channels,
        down_block_types=down,
        up_block_types=up,
        layers_per_block=config.layers_per_block,
        attention_head_dim=config.attention_head_dim,
        cross_attention_dim=condition_dim,
        norm_num_groups=config.norm_num_groups,
    )


def over_the_image(condition: Tensor, size: int) -> Tensor:
    """The condition [batch, patch, channel] of a square grid of patches, each at its place: [batch, channel, size, size]."""
    side = math.isqrt(condition.shape[1])
    return F.interpolate(condition.transpose(1, 2).unflatten(-1, (side, side)), size=size, mode="nearest")
