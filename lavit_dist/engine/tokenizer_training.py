"""Training of the visual tokenizer on frozen features, phase by phase (Eq. 4)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lavit_dist.checkpoint.snapshot import Snapshot
from lavit_dist.config.tokenizer import PhaseConfig, TrainTokenizerConfig
from lavit_dist.data.image_batches import ImageBatch, ImageBatches, merge_states
from lavit_dist.data.quarantine import write_quarantine
from lavit_dist.engine.averaged_weights import AveragedWeights
from lavit_dist.engine.codebook import CodebookLearner, TokenVectors
from lavit_dist.engine.data_parallel import FACTS, DataParallelEngine
from lavit_dist.engine.feature_cache import FeatureCache
from lavit_dist.engine.token_counts import TokenCounts
from lavit_dist.engine.tokenizer_phases import Phase, gumbel_temperature, phase_of, phases_of
from lavit_dist.errors import check
from lavit_dist.files import read_json
from lavit_dist.models.autoencoder import FeatureAutoencoder, Reconstruction
from lavit_dist.models.selector import keyed_gumbel_noise, select_some
from lavit_dist.models.tokenizer_losses import (
    codebook_loss,
    commitment_loss,
    error_quantile,
    guidance_loss,
    likeness_loss,
    rate_loss,
    reconstruction_error,
)
from lavit_dist.models.visual_tokenizer import VisualTokenizer
from lavit_dist.parallel.distributed import device, gather, gather_objects, matmul_precision, mean_over_ranks, rank, world_size

logger = logging.getLogger(__name__)
CODEBOOK, AVERAGES = "codebook.", "averages."
"""Prefixes of tensors in a checkpoint."""
THRESHOLD_DECAY = 0.8
"""Weight of the past in the error above which a dropped patch should have been kept; it falls quickly at first."""


class MicroBatch(NamedTuple):
    """What one backward pass takes."""

    positions: list[int]
    """Places of the images in the global batch."""
    features: Tensor
    """Frozen features [image, patch, width]."""
    noise: Tensor
    """Selection noise [image, patch, 2], which depends on the seed, the step and the place alone."""
    keep_mask: Tensor
    """The patches that are kept, bools [image, patch]."""


class TokenizerTraining:
    """A `Trainable`: the parts that the phase names by gradient, the codebook by moving averages that all ranks share.

    Losses and codebook are the same (to rounding) however the global batch is shared out to ranks and micro-batches.
    """

    memory_advice = "Lower micro_batch_size, which changes nothing else, or set zero_stage to 2; feature_cache_bytes counts, too."

    def __init__(
        self,
        config: TrainTokenizerConfig,
        tokenizer: VisualTokenizer,
        images: ImageBatches,
        features: FeatureCache,
        tower_digest: str,
    ) -> None:
        """`tower_digest` tells the tower from others: a resumed run must have the one that it began with."""
        self.config = config
        self.tower_digest = tower_digest
        self.images = images
        self.features = features
        self.tokenizer = tokenizer.to(device())
        self.model = FeatureAutoencoder(tokenizer)
        self.codebook = CodebookLearner(self.model.quantizer, seed=config.seed, usage_window=config.health.usage_window_steps)
        self.averages = AveragedWeights(self.model, config.ema_decay)
        self.error_threshold: float | None = None
        """Error above which a dropped patch should have been kept; None until one was measured."""
        self.token_counts = TokenCounts(config.encoder.num_patches)
        """How many tokens images got of late, for whoever draws it."""
        self.engine: DataParallelEngine
        self.phase: Phase | None = None
        self.batches_read = 0
        self.micro_batch_size = config.micro_batch_size or config.global_batch_size // world_size()

    def train_step(self, step: int) -> Mapping[str, float]:
        phase = phase_of(self.config, step)
        if self.phase != phase:
            self._prepare(phase)
            self._enter(phase)
        waited, remembered = self.images.wait_seconds, self.features.hits
        batches = list(self._read(step, phase.config))
        waited = self.images.wait_seconds - waited
        images = sum(len(batch.positions) for batch in batches)
        remembered = self.features.hits - remembered
        keep_ratios = gather(torch.cat([batch.keep_mask.float().mean(-1) for batch in batches]))
        figures: dict[str, Tensor] = {}
        every = self.config.health.continuous_every_steps
        if phase.config.quantize and every and step % every == 0:
            figures["continuous_reconstruction_loss"] = torch.stack(
                [self._continuous_error(batch).mean() for batch in batches]
            ).mean()
        if self._guided(phase.config) and self.error_threshold is None:
            errors = [self._continuous_error(batch).cpu() for batch in batches]
            self._move_threshold(torch.cat(errors), torch.cat([batch.keep_mask.cpu() for batch in batches]))
        threshold = self.error_threshold
        figures |= self._backward(batches, step, phase, keep_ratios.mean().item())
        metrics = mean_over_ranks(
            {name: value.item() for name, value in figures.items()}
            | {"data_wait_seconds": waited, "features_remembered": remembered / images}
        )
        metrics |= self._rate_figures(keep_ratios, batches[0].features.shape[1])
        metrics |= self.engine.step()
        if math.isfinite(metrics["grad_norm"]):
            if phase.config.quantize:
                metrics |= self.codebook.update(step, learn="codebook" in phase.config.train)
            self.averages.update(step)
        else:  # nothing of this step may stay
            self.codebook.clear()
            self.error_threshold = threshold
        return metrics | {
            "phase": float([of.name for of in phases_of(self.config)].index(phase.name)),
            "quantizing": float(phase.config.quantize),
            "images_quarantined": float(sum(self.images.quarantined_counts.values())),
            "images": float(self.config.global_batch_size),
        }

    def _backward(self, batches: Sequence[MicroBatch], step: int, phase: Phase, keep_ratio: float) -> dict[str, Tensor]:
        """Gradients of all micro-batches, their vectors to the codebook, and each loss's mean over them."""
        figures: dict[str, list[Tensor]] = {}
        errors = []
        for batch in batches:
            out = self._forward(batch, step, phase)
            error = reconstruction_error(batch.features, out.features)
            losses = self._losses(batch, out, error, phase.config, keep_ratio)
            loss = torch.stack(list(losses.values())).sum()
            self.engine.backward(loss)
            for name, value in {"loss": loss, **losses}.items():
                figures.setdefault(name, []).append(value.detach())
            errors.append(error.detach())
            if out.quantized is not None:
                lengths = batch.keep_mask.sum(-1).tolist()
                self.codebook.collect(batch.positions, lengths, out.unit.detach(), out.quantized.codes)
        if self._guided(phase.config):
            self._move_threshold(torch.cat(errors), torch.cat([batch.keep_mask for batch in batches]))
        return {name: torch.stack(values).mean() for name, values in figures.items()}

    def _rate_figures(self, keep_ratios: Tensor, num_patches: int) -> dict[str, float]:
        tokens = keep_ratios * num_patches
        self.token_counts.add(tokens.round())
        return {
            "keep_ratio": keep_ratios.mean().item(),
            "keep_ratio_std": keep_ratios.std(correction=0).item(),
            "tokens_per_image": tokens.mean().item(),
            "tokens_per_image_std": tokens.std(correction=0).item(),
        }

    def snapshot(self) -> Snapshot:
        assert self.phase is not None
        tensors = {CODEBOOK + name: value for name, value in self.codebook.state_dict().items()}
        tensors |= {AVERAGES + name: value for name, value in self.averages.state_dict().items()}
        facts = {
            "phase": self.phase.name,
            "tower": self.tower_digest,
            "error_threshold": self.error_threshold,
            "batches_read": self.batches_read,
            "images": merge_states(gather_objects(self.images.state_dict())),
        }
        self.write_quarantine()
        return self.engine.snapshot(tensors, facts)

    def load(self, folder: Path) -> None:
        path = folder / FACTS
        check(
            path.exists(), f"{folder} is no checkpoint of a visual tokenizer's training: it has no {FACTS}; name another run_dir."
        )
        saved = read_json(path, "resume from an earlier step")
        phases = {phase.name: phase for phase in phases_of(self.config)}
        check(
            saved.get("phase") in phases,
            f"{folder} was written in the phase {saved.get('phase')!r}, but phases are now {', '.join(phases)}; restore that phase.",
        )
        check(
            saved.get("tower") == self.tower_digest,
            f"{folder} was written with another tower than {self.config.tower} holds now; restore that tower, or name another run_dir.",
        )
        self._enter(phases[saved["phase"]])
        tensors, facts = self.engine.load(folder, ("error_threshold", "images", "batches_read"))
        self.codebook.load_state_dict(_below(CODEBOOK, tensors))
        self.averages.load_state_dict(_below(AVERAGES, tensors))
        self.error_threshold = facts["error_threshold"]
        self.images.load_state_dict(facts["images"])
        self.batches_read = facts["batches_read"]

    def skip_batches(self, count: int) -> None:
        for _ in range(count):
            self._next()

    def _next(self) -> ImageBatch:
        self.batches_read += 1
        return self.images.next()

    def write_quarantine(self) -> None:
        """Writes down this rank's images that couldn't be used: RUN_DIR/quarantine/rank-00000.jsonl."""
        path = Path(self.config.run_dir) / "quarantine" / f"rank-{rank():05d}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_quarantine(path, self.images.quarantined.values())
        except OSError as error:  # it is written again with the next checkpoint
            logger.warning("%s couldn't be written: %s", path, error)

    def product(self) -> VisualTokenizer:
        """The tokenizer to publish, with averaged weights where they are kept."""
        product = self.averages.product
        product.quantizer.normalise()  # an average of unit vectors is shorter
        self.tokenizer.tokenizer_encoder, self.tokenizer.decoder = product.tokenizer_encoder, product.decoder
        return self.tokenizer

    def _enter(self, phase: Phase) -> None:
        """Sets what learns, and gives it a new optimizer."""
        config, settings = self.config, phase.config
        if self.phase is not None:
            self.engine.close()
        self.model.requires_grad_(False)
        scales: dict[nn.Parameter, float] = {}
        for part in settings.train:
            if part != "codebook" or config.codebook.learning == "gradient":
                for parameter in self.model.part(part).requires_grad_(True).parameters():
                    scales[parameter] = settings.learning_rate_scale * settings.part_learning_rate_scales.get(part, 1.0)
        self.model.decoder.unet_proj.requires_grad_(False)  # train_decoder trains it
        self.engine = DataParallelEngine(
            self.model,
            optimizer=config.optimizer_of(settings),
            total_steps=settings.steps,
            micro_batch_size=self.micro_batch_size,
            accumulation_steps=config.global_batch_size // world_size() // self.micro_batch_size,
            precision=config.precision,
            zero_stage=config.zero_stage,
            learning_rate_scales=scales,
        )
        self.phase = phase
        logger.info("phase %s: %s learn for %d steps", phase.name, ", ".join(settings.train), settings.steps)

    @torch.no_grad()
    def _prepare(self, phase: Phase) -> None:
        """Calibrates the selector and initialises the codebook, where the phase starts with that, over the next batches.

        Before the phase's engine is made: under ZeRO that keeps a copy of the weights.
        """
        config, settings = self.config, phase.config
        initialise = config.initialises_codebook(phase.name)
        if not settings.calibrate_selector and not initialise:
            return
        features = []
        for _ in range(config.kmeans_batches):
            batch = self._next()
            features.append((batch.positions, self._encode(batch.keys, batch.pixel_values).cpu()))
        if settings.calibrate_selector:
            log_probs = gather(torch.cat([self.model.selector(of_batch.to(device())) for _, of_batch in features]))
            self.model.selector.calibrate(log_probs, config.rate.keep_ratio, sampled=settings.selection != "argmax")
        if initialise:
            vectors: list[TokenVectors] = []
            for index, (positions, of_batch) in enumerate(features):
                places = [index * config.global_batch_size + position for position in positions]
                for start in range(0, len(places), self.micro_batch_size):
                    part = slice(start, start + self.micro_batch_size)
                    micro = self._micro_batch(f"kmeans/{phase.name}", places[part], of_batch[part].to(device()), settings)
                    with matmul_precision(config.precision):
                        out = self.model(micro.features, keep_mask=micro.keep_mask, quantize=False)
                    lengths = micro.keep_mask.sum(-1).tolist()
                    vectors += [TokenVectors(*each) for each in zip(places[part], out.unit.split(lengths), strict=True)]
            self.codebook.initialise(vectors, batches=config.kmeans_batches)
            logger.info("codebook initialised by k-means over %d batches", config.kmeans_batches)

    def _read(self, step: int, settings: PhaseConfig) -> Iterator[MicroBatch]:
        """This rank's share of the next global batch, in micro-batches."""
        batch = self._next()
        features = self._encode(batch.keys, batch.pixel_values)
        for start in range(0, len(features), self.micro_batch_size):
            part = slice(start, start + self.micro_batch_size)
            yield self._micro_batch(f"step/{step}", batch.positions[part], features[part], settings)

    def _encode(self, keys: Sequence[str], pixel_values: Tensor) -> Tensor:
        """Frozen features [image, patch, width] in fp32; the tower sees a micro-batch at a time."""
        parts = []
        for start in range(0, len(keys), self.micro_batch_size):
            part = slice(start, start + self.micro_batch_size)
            with matmul_precision(self.config.precision):
                parts.append(self.features(keys[part], pixel_values[part].to(device())).float())
        return torch.cat(parts)

    @torch.no_grad()
    def _micro_batch(self, moment: str, positions: list[int], features: Tensor, settings: PhaseConfig) -> MicroBatch:
        noise = keyed_gumbel_noise([f"{moment}/{position}" for position in positions], features.shape[1], self.config.seed)
        noise = noise.to(features.device)
        if settings.selection == "random":
            ratio = self.config.rate.keep_ratio
            mask = select_some(features.new_tensor([ratio, 1 - ratio]).log().expand_as(noise), noise)
        else:
            mask = select_some(self.model.selector(features), noise if settings.selection == "gumbel" else None)
        return MicroBatch(positions, features, noise, mask)

    def _forward(self, batch: MicroBatch, step: int, phase: Phase) -> Reconstruction:
        settings = phase.config
        if settings.straight_through:
            temperature = gumbel_temperature(settings, step - phase.first_step)
            return self.engine.module(batch.features, gumbel_noise=batch.noise, temperature=temperature, quantize=settings.quantize)
        guided = self._guided(settings)
        return self.engine.module(batch.features, keep_mask=batch.keep_mask, quantize=settings.quantize, with_log_probs=guided)

    def _losses(
        self, batch: MicroBatch, out: Reconstruction, error: Tensor, settings: PhaseConfig, keep_ratio: float
    ) -> dict[str, Tensor]:
        """The terms whose sum is minimised, by the names that they are reported under."""
        config = self.config
        tokens = keep_ratio * batch.keep_mask.numel()  # a micro-batch's share of those of the global batch
        losses = {"reconstruction_loss": error.mean()}
        if settings.straight_through:
            losses["rate_loss"] = config.rate.weight * rate_loss(out.keep_mask, keep_ratio, config.rate)
        elif self._guided(settings):
            assert out.log_probs is not None
            dropped = batch.keep_mask.numel() - tokens
            # None until something was dropped, without which there is nothing to be guided by.
            threshold = math.inf if self.error_threshold is None else self.error_threshold
            losses["selector_loss"] = guidance_loss(error, batch.keep_mask, out.log_probs, threshold, dropped)
        if config.likeness_weight:
            losses["likeness_loss"] = config.likeness_weight * likeness_loss(out.unit, (batch.keep_mask > 0).sum(-1))
        if out.quantized is not None:
            if config.commitment_cost:
                losses["commitment_loss"] = config.commitment_cost * commitment_loss(out.unit, out.quantized.chosen, tokens)
            if config.codebook.learning == "gradient" and "codebook" in settings.train:
                losses["codebook_loss"] = codebook_loss(out.unit, out.quantized.chosen, tokens)
        return losses

    @torch.no_grad()
    def _continuous_error(self, batch: MicroBatch) -> Tensor:
        """What each patch of the images would lose without the quantizer, [image, patch]."""
        out = self.engine.module(batch.features, keep_mask=batch.keep_mask, quantize=False)
        return reconstruction_error(batch.features, out.features)

    def _guided(self, settings: PhaseConfig) -> bool:
        return "selector" in settings.train and settings.selector_signal == "reconstruction_error"

    def _move_threshold(self, errors: Tensor, keep_mask: Tensor) -> None:
        """Follows the error that a share `keep_ratio` of all dropped patches lies above."""
        every, kept = gather(errors.to(device())), gather(keep_mask.to(device()))
        if kept.all():
            return
        now = error_quantile(every[~kept], self.config.rate.keep_ratio)
        before = now if self.error_threshold is None else self.error_threshold
        self.error_threshold = THRESHOLD_DECAY * before + (1 - THRESHOLD_DECAY) * now


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
