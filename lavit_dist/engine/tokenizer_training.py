"""Training of the visual tokenizer on frozen features: first continuous, then with the quantizer on (Eq. 4)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lavit_dist.config.tokenizer import TrainTokenizerConfig
from lavit_dist.data.hashing import stable_hash
from lavit_dist.data.pairs import PairBatches
from lavit_dist.engine.data_parallel import DataParallelEngine
from lavit_dist.engine.feature_cache import FeatureCache
from lavit_dist.models.selector import gumbel_noise
from lavit_dist.models.tokenizer_losses import guidance_loss, rate_loss, reconstruction_loss
from lavit_dist.models.visual_tokenizer import Reconstruction, VisualTokenizer
from lavit_dist.parallel.distributed import device, gather, mean_over_ranks, mean_with_gradient, rank, world_size

logger = logging.getLogger(__name__)
HITS = "codebook_hits"


class TokenizerTraining:
    """A `Trainable`: selector, merger, decoder by gradient, the codebook by moving averages that all ranks share."""

    def __init__(self, config: TrainTokenizerConfig, tokenizer: VisualTokenizer, batches: PairBatches) -> None:
        self.config = config
        self.batches = batches
        self.tokenizer = tokenizer.to(device())
        self.features = FeatureCache(lambda _, pixel_values: tokenizer.encode(pixel_values), config.feature_cache_bytes)
        self.engine = DataParallelEngine(
            self.tokenizer,
            optimizer=config.optimizer,
            total_steps=config.total_steps,
            micro_batch_size=config.global_batch_size // world_size(),
            precision=config.precision,
            # ZeRO keeps its own copy of the weights and would go on moving a selector that has been frozen.
            zero_stage=0 if config.freeze_selector else 1,
        )

    def train_step(self, step: int) -> Mapping[str, float]:
        config = self.config
        quantize = step >= config.quantize_from
        if quantize and config.freeze_selector:
            self.tokenizer.selector.requires_grad_(False)
        if step == config.quantize_from:
            self._switch_quantizer_on(step)
        features = self._features(step)
        at_random = config.selector_signal == "reconstruction_error" and not quantize
        out = self.engine.module(
            features,
            self._noise(step, features),
            temperature=config.gumbel_temperature,
            quantize=quantize,
            random_keep_ratio=config.keep_ratio if at_random else None,
        )
        reconstruction = reconstruction_loss(features, out.features)
        loss = reconstruction + config.rate_weight * rate_loss(mean_with_gradient(out.keep_mask.mean()), config.keep_ratio)
        figures: dict[str, float] = {}
        if at_random:
            guidance = guidance_loss(features, out, config.keep_ratio)
            loss = loss + guidance
            figures["selector_loss"] = guidance.item()
        if out.quantized is not None and config.commitment_cost:
            committed = (out.quantized.unit - self.tokenizer.quantizer.embedding(out.quantized.codes)).square().sum(-1).mean()
            loss = loss + config.commitment_cost * committed
        tokens = out.keep_mask.detach().sum(-1)
        metrics = mean_over_ranks(
            {
                "loss": loss.item(),
                "reconstruction_loss": reconstruction.item(),
                "keep_ratio": out.keep_mask.mean().item(),
                "tokens_per_image": tokens.mean().item(),
                "tokens_per_image_std": tokens.std().item(),
                **figures,
            }
        )
        metrics |= self.engine.step(loss)
        if out.quantized is not None:
            metrics |= self._move_codebook(out, step)
        return metrics | {"images": float(config.global_batch_size)}

    def save(self, folder: Path) -> None:
        self.engine.save(folder, {HITS: self.tokenizer.quantizer.hits})

    def load(self, folder: Path) -> None:
        self.tokenizer.quantizer.hits.copy_(self.engine.load(folder)[HITS])

    def _features(self, step: int) -> Tensor:
        batch = self.batches.batch(step)
        return self.features(batch.indices, batch.keys, batch.pixel_values.to(device()))

    def _noise(self, step: int, features: Tensor) -> Tensor:
        """Selection noise that depends on the seed, the step and the rank alone, so that a resumed run draws the same."""
        return gumbel_noise((*features.shape[:2], 2), self._generator(step, "selection")).to(features.device)

    def _generator(self, step: int, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(stable_hash(purpose, self.config.seed, step, rank()) >> 1)

    @torch.no_grad()
    def _switch_quantizer_on(self, step: int) -> None:
        """k-means over the vectors of the next batches, and the frozen selector's bias, alike on every rank."""
        config, tokenizer = self.config, self.tokenizer
        ahead = [self._features(step + index) for index in range(config.kmeans_batches)]
        if config.freeze_selector:
            tokenizer.selector.calibrate(gather(torch.cat([tokenizer.selector(features) for features in ahead])), config.keep_ratio)
        vectors = []
        for index, features in enumerate(ahead):
            noise = self._noise(step + index, features)
            vectors.append(tokenizer(features, noise, temperature=config.gumbel_temperature, quantize=False).kept_vectors)
        if rank() == 0:
            batches = config.kmeans_batches / world_size()  # global ones, of whose vectors rank 0 has its share
            tokenizer.quantizer.initialise(torch.cat(vectors).cpu(), torch.Generator().manual_seed(config.seed), batches=batches)
        if world_size() > 1:
            dist.broadcast(tokenizer.quantizer.embedding.weight, 0)
            dist.broadcast(tokenizer.quantizer.hits, 0)
        logger.info("quantizer on: codebook initialised by k-means over %d batches", config.kmeans_batches)

    @torch.no_grad()
    def _move_codebook(self, out: Reconstruction, step: int) -> dict[str, float]:
        assert out.quantized is not None
        quantizer = self.tokenizer.quantizer
        counts, sums = quantizer.statistics(out.quantized)
        size = quantizer.config.size
        draw = torch.randint(len(out.quantized.unit), (size,), generator=self._generator(step, "revival"))
        candidates = out.quantized.unit[draw.to(out.quantized.unit.device)]
        if world_size() > 1:
            dist.all_reduce(counts)
            dist.all_reduce(sums)
            dist.broadcast(candidates, 0)
        revived = quantizer.update(counts, sums, candidates)
        share = counts / counts.sum()
        perplexity = torch.special.entr(share).sum().exp()
        return {
            "perplexity": perplexity.item(),
            "codes_used": 1 - revived / size,
            "codes_revived": float(revived),
        }
