"""Training of the pixel decoder: the U-Net learns to see the noise in an image, given what the frozen tokenizer makes of it (Eq. 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from lavit_dist.checkpoint.snapshot import Snapshot
from lavit_dist.config.decoder import TrainDecoderConfig
from lavit_dist.data.hashing import stable_hash
from lavit_dist.data.image_order import places
from lavit_dist.engine.averaged_weights import AveragedWeights
from lavit_dist.engine.data_parallel import DataParallelEngine
from lavit_dist.engine.decoder_examples import Examples
from lavit_dist.models.pixel_decoder import PixelDecoder
from lavit_dist.parallel.distributed import device, mean_over_ranks, rank, world_size

DATA, SKIPPED = "data", "batches_skipped"


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

    memory_advice = "Start more processes, lower global_batch_size, or set zero_stage to 1; feature_cache_bytes counts, too."

    def __init__(
        self,
        config: TrainDecoderConfig,
        decoder: PixelDecoder,
        scheduler: DDIMScheduler,
        examples: Examples,
    ) -> None:
        self.config = config
        self.examples = examples
        self.skipped = 0
        """How many batches of examples were left out."""
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
        clean, features = self.examples.batch(step + self.skipped)
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
        if math.isfinite(metrics["grad_norm"]):
            self.averages.update(step)
        return metrics | {"images": float(self.config.global_batch_size)}

    def product(self) -> PixelDecoder:
        """The decoder to publish."""
        return self.averages.product

    def snapshot(self) -> Snapshot:
        return self.engine.snapshot(self.averages.state_dict(), {DATA: self.examples.state(), SKIPPED: self.skipped})

    def load(self, folder: Path) -> None:
        averages, facts = self.engine.load(folder, (DATA, SKIPPED))
        self.examples.check_state(facts[DATA])
        self.averages.load_state_dict(averages)
        self.skipped = facts[SKIPPED]

    @property
    def batches_read(self) -> int:
        return self.engine.steps + self.skipped

    def skip_batches(self, count: int) -> None:
        self.skipped += count

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
    """A pure function of the seed, the step and each image's place in the global batch: neither a resume nor other ranks draw otherwise."""
    timesteps, noises, dropped = [], [], []
    for place in places(config.global_batch_size, rank(), world_size()):
        generator = torch.Generator().manual_seed(stable_hash("diffusion", config.seed, step, place) >> 1)
        timesteps.append(torch.randint(config.model.num_train_timesteps, (), generator=generator))
        noises.append(torch.randn(shape[1:], generator=generator))
        dropped.append(torch.rand((), generator=generator) < config.condition_dropout)
    return Draws(torch.stack(timesteps), torch.stack(noises), torch.stack(dropped))


def signal_to_noise(scheduler: DDIMScheduler) -> Tensor:
    """The ratio of signal to noise power at each timestep, fp32 [timestep]."""
    return scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
