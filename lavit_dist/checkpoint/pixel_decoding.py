"""The folder of a pixel decoder in the released layout, read and written.

FOLDER/pixel_decoding/unet/         diffusers UNet2DConditionModel
FOLDER/pixel_decoding/scheduler/    diffusers scheduler: the noise levels
FOLDER/pixel_decoding/vae/          diffusers AutoencoderKL, where latents are diffused
FOLDER/pixel_decoding/config.json   how pixels become latents (ours; the release is Stable Diffusion 1.5, the defaults)
FOLDER/visual_tokenizer/            the tokenizer, whose tokenizer_decoder.bin holds `unet_proj`
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from lavit_dist.checkpoint.digests import tensors_digest
from lavit_dist.checkpoint.official import load_visual_tokenizer, save_visual_tokenizer
from lavit_dist.config.base import build, to_dict
from lavit_dist.config.model import PixelDecoderConfig
from lavit_dist.errors import UserError
from lavit_dist.models.pixel_decoder import Latents, PixelDecoder, PixelFolding, VaeLatents
from lavit_dist.models.visual_tokenizer import VisualTokenizer

SUBFOLDER = "pixel_decoding"
UNET, SCHEDULER, VAE = "unet", "scheduler", "vae"
SIZES = "config.json"


class LoadedDecoder(NamedTuple):
    """All that turns codes into pixels."""

    tokenizer: VisualTokenizer
    decoder: PixelDecoder
    latents: Latents
    scheduler: DDIMScheduler


def load_pixel_decoder(folder: str | Path) -> LoadedDecoder:
    """The decoder in `folder` and the tokenizer beside it, frozen and in evaluation mode; `UserError` names what is missing."""
    inner = Path(folder) / SUBFOLDER
    if not inner.is_dir():
        raise UserError(
            f"{folder} holds no pixel decoder: it has no folder {SUBFOLDER}; name the product of train_decoder, RUN_DIR/model."
        )
    tokenizer = load_visual_tokenizer(folder)
    sizes = inner / SIZES
    values = json.loads(sizes.read_text()) if sizes.exists() else {"vae": str(inner / VAE)}
    config = build(PixelDecoderConfig, values, source=str(sizes))
    decoder = PixelDecoder(config, load_unet(inner / UNET), tokenizer.decoder.unet_proj)
    latents = VaeLatents(load_vae(inner / VAE)) if config.latent == "vae" else PixelFolding(config.latent_factor)
    scheduler = _load(DDIMScheduler, inner / SCHEDULER)
    return LoadedDecoder(tokenizer, decoder.eval().requires_grad_(False), latents, scheduler)


def save_pixel_decoder(
    folder: Path, tokenizer: VisualTokenizer, decoder: PixelDecoder, latents: Latents, scheduler: DDIMScheduler
) -> None:
    """Writes what `load_pixel_decoder` reads; the tokenizer's `unet_proj` becomes the decoder's."""
    inner = folder / SUBFOLDER
    tokenizer.decoder.unet_proj.load_state_dict(decoder.unet_proj.state_dict())
    save_visual_tokenizer(tokenizer, folder)
    decoder.unet.save_pretrained(inner / UNET)
    scheduler.save_pretrained(inner / SCHEDULER)
    if isinstance(latents, VaeLatents):
        latents.vae.save_pretrained(inner / VAE)
    (inner / SIZES).write_text(json.dumps(to_dict(decoder.config), indent=1))


def load_unet(folder: str | Path) -> UNet2DConditionModel:
    """A diffusers U-Net, fp32."""
    return _load(UNet2DConditionModel, folder, low_cpu_mem_usage=False)


def load_vae(folder: str | Path) -> AutoencoderKL:
    """A diffusers autoencoder, fp32."""
    return _load(AutoencoderKL, folder, low_cpu_mem_usage=False)


def vae_digest(vae: AutoencoderKL) -> str:
    """sha256 over what decides an image's latents: the autoencoder's weights and the factor that scales them."""
    encoder = {name: tensor for name, tensor in vae.state_dict().items() if not name.startswith(("decoder.", "post_quant_conv."))}
    return tensors_digest(encoder | {"scaling_factor": torch.tensor(float(vae.config["scaling_factor"]))})


def make_scheduler(config: PixelDecoderConfig) -> DDIMScheduler:
    """The noise levels of training and, by DDIM's deterministic steps, of sampling."""
    pixels = config.latent == "pixel_unshuffle"
    return DDIMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        prediction_type=config.prediction_type,
        steps_offset=1,
        clip_sample=pixels,  # pixels lie in [-1, 1]
        set_alpha_to_one=pixels,  # the last step leaves no noise; Stable Diffusion's leaves a trace, which its autoencoder takes out
    )


def check_unet(unet: UNet2DConditionModel, folder: str, config: PixelDecoderConfig, condition_dim: int) -> None:
    """Raises `UserError` when the U-Net in `folder` doesn't fit the latent or the tokenizer's `unet_proj`."""
    expected = {
        "in_channels": config.latent_channels + (condition_dim if config.concatenate_condition else 0),
        "out_channels": config.latent_channels,
        "cross_attention_dim": condition_dim,
    }
    for name, value in expected.items():
        found = unet.config[name]
        if found != value:
            raise UserError(
                f"initial_unet {folder} has {name} = {found}, but the latent and the tokenizer's unet_dim ask for {value};"
                " choose another U-Net, or change model.latent_channels, model.concatenate_condition or the tokenizer."
            )


def _load(cls: Any, folder: str | Path, **options: Any) -> Any:
    try:
        return cls.from_pretrained(str(folder), local_files_only=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{folder} can't be read as a diffusers {cls.__name__} ({reason}); name a folder that one was saved to."
        ) from error
