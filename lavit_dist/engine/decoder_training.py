"""Training of the pixel decoder: the U-Net learns to see the noise in an image, given what the frozen tokenizer makes of it (Eq. 5)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from lavit_dist.config.decoder import TrainDecoderConfig
from lavit_dist.data.hashing import stable_hash
from lavit_dist.engine.averaged_weights import AveragedWeights
from lavit_dist.engine.data_parallel import DataParallelEngine
from lavit_dist.engine.decoder_examples import Examples
from lavit_dist.models.pixel_decoder import PixelDecoder
from lavit_dist.parallel.distributed import device, mean_over_ranks, rank, world_size

AVERAGES, DATA = "averaged_weights", "data"


class Draws(NamedTuple):
    """The randomness of one rank's share of a step."""

    timesteps: Tensor
    """[batch], int64, 0 .. num_train_timesteps - 1."""
    noise: Tensor
    """[batch, channel, height, width], standard normal."""
    dropped: Tensor
    """[batch] bools: whose condition is dropped."""


class DecoderTraining:
    """A `Trainable`: the U-Net and `unet_proj` by gradient, and a moving average of both, which is the product."""

    def __init__(
        self,
        config: TrainDecoderConfig,
        decoder: PixelDecoder,
        scheduler: DDIMScheduler,
        examples: Examples,
    ) -> None:
        self.config = config
        self.examples = examples
        self.scheduler = scheduler
        self.decoder = decoder.to(device())
        self.averages = AveragedWeights(self.decoder, config.ema_decay)
        self.snr = signal_to_noise(scheduler).to(device())
        self.engine = DataParallelEngine(
            _Denoising(self.decoder),
            optimizer=config.optimizer,
            total_steps=config.total_steps,
            micro_batch_size=config.global_batch_size // world_size(),
            precision=config.precision,
            zero_stage=config.zero_stage,
        )

    def train_step(self, step: int) -> Mapping[str, float]:
        clean, features = self.examples.batch(step)
        draws = draw(step, clean.shape, self.config)
        timesteps, noise, dropped = (part.to(device()) for part in draws)
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        predicted = self.engine.module(noisy, timesteps, features, dropped)
        target = noise if self.config.model.prediction_type == "epsilon" else clean
        error = (predicted - target).square().mean((1, 2, 3))
        loss = (error * self._weights(timesteps)).mean()
        metrics = mean_over_ranks({"loss": loss.item(), "error": error.mean().item()})
        self.engine.backward(loss)
        metrics |= self.engine.step()
        self.averages.update(step)
        return metrics | {"images": float(self.config.global_batch_size)}

    def product(self) -> PixelDecoder:
        """The decoder to publish."""
        return self.averages.product

    def save(self, folder: Path) -> None:
        self.engine.save(folder, {AVERAGES: self.averages.state_dict(), DATA: self.examples.state()})

    def load(self, folder: Path) -> None:
        state = self.engine.load(folder)
        self.examples.check_state(state[DATA])
        self.averages.load_state_dict(state[AVERAGES])

    def _weights(self, timesteps: Tensor) -> Tensor:
        """Weight [batch] of each squared error: error of the noise = SNR x error of the image, whichever is predicted."""
        config, snr = self.config, self.snr[timesteps]
        of_image = snr if config.loss_weighting == "epsilon" else snr.clamp(config.snr_floor, config.snr_gamma)
        return of_image / snr if config.model.prediction_type == "epsilon" else of_image


class _Denoising(nn.Module):
    """The one forward call that DeepSpeed's engine wraps."""

    def __init__(self, decoder: PixelDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, noisy: Tensor, timesteps: Tensor, features: Tensor, dropped: Tensor) -> Tensor:
        return self.decoder(noisy, timesteps, self.decoder.condition(features, dropped))


def draw(step: int, shape: torch.Size, config: TrainDecoderConfig) -> Draws:
    """A pure function of the seed, the step and the rank, so that a resumed run draws the same."""
    generator = torch.Generator().manual_seed(stable_hash("diffusion", config.seed, step, rank()) >> 1)
    timesteps = torch.randint(config.model.num_train_timesteps, shape[:1], generator=generator)
    noise = torch.randn(shape, generator=generator)
    dropped = torch.rand(shape[:1], generator=generator) < config.condition_dropout
    return Draws(timesteps, noise, dropped)


def signal_to_noise(scheduler: DDIMScheduler) -> Tensor:
    """The ratio of signal to noise power at each timestep, fp32 [timestep]."""
    return scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
