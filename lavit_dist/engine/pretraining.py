"""Pretraining of the language model on packed rows, on any parallel layout."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from lavit_dist.checkpoint.llama_state import FACTS, CheckpointFacts, layout_facts, read_facts
from lavit_dist.checkpoint.snapshot import Snapshot
from lavit_dist.config.base import to_dict
from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.data.global_batches import GlobalBatches
from lavit_dist.data.micro_batch import PADDING_DOCUMENT, MicroBatch
from lavit_dist.data.read_ahead import ReadAhead
from lavit_dist.engine.checks import RankChecks
from lavit_dist.engine.engine_state import engine_snapshot, load_engine
from lavit_dist.engine.llama_engine import build_engine
from lavit_dist.engine.schedule import learning_rate_factor
from lavit_dist.engine.skipped_steps import keep_schedule
from lavit_dist.engine.throughput import device_name, peak_flops, peak_memory_gib
from lavit_dist.models.llama import training_flops
from lavit_dist.models.vocabulary import Vocabulary
from lavit_dist.parallel.distributed import device, rank
from lavit_dist.parallel.host_memory import keep_freed_memory
from lavit_dist.parallel.megatron_llama import Weights, random_weights
from lavit_dist.parallel.topology import Layout
from lavit_dist.parallel.vocab_loss import Targets

logger = logging.getLogger(__name__)


class StepSums(NamedTuple):
    """What one rank adds to a step's figures: losses on last stages, tokens on first ones, once per tensor-parallel group."""

    loss: float = 0.0
    text_loss: float = 0.0
    text_tokens: float = 0.0
    image_loss: float = 0.0
    image_tokens: float = 0.0
    tokens: float = 0.0
    attended: float = 0.0


class Pretraining:
    """A `Trainable`: cross-entropy of the next token over packed rows; losses and updates don't depend on the layout."""

    memory_advice = (
        "Lower micro_batch_size, set activation_checkpointing.mode to full, raise parallel.tensor_parallel_size or"
        " parallel.pipeline_parallel_size, or have parallel.zero_stage share out more; seq_len counts, too."
    )

    def __init__(self, config: PretrainConfig, layout: Layout, batches: GlobalBatches, weights: Weights | None = None) -> None:
        """Starts from `weights`, or from random ones."""
        self.config = config
        self.layout = layout
        self.batches = batches
        self.vocabulary: Vocabulary = batches.rows.vocabulary
        self.place = layout.coordinates(rank())
        self._read_ahead = ReadAhead(self._micro_batches, config.total_steps)
        self.engine, self.losses = build_engine(
            config, layout, self.vocabulary, weights or random_weights(config.model, config.seed)
        )
        self.peak_flops = peak_flops(device_name()) if config.precision == "bf16" else None
        if self.peak_flops is None and rank() == 0:
            logger.info("unknown peak of %s in %s: MFU is not told", device_name() or "a CPU", config.precision)
        self.checks = RankChecks(self.engine, layout) if config.checks.every_steps else None
        if self.checks is not None:
            self.checks.check_groups()
            self.checks.check_state("At the start")

    def train_step(self, step: int) -> Mapping[str, float]:
        """Takes step `step`; `learning_rate` in what it returns is the base rate, before the factors of parameters.learning_rate_scale."""
        keep_freed_memory()  # weights and checkpoints have been read
        start = time.perf_counter()
        micro_batches = self._read_ahead(step)
        data_wait = time.perf_counter() - start
        optimizer = self.config.optimizer
        factor = learning_rate_factor(step, total_steps=self.config.total_steps, optimizer=optimizer)
        if self.layout.pipe_size > 1:
            self.engine.train_batch(iter([_split(batch) for batch in micro_batches]))
        else:
            for batch in micro_batches:
                inputs, targets = _split(batch)
                loss = self.engine(tuple(t.to(device()) for t in inputs), Targets(*(t.to(device()) for t in targets)))
                self.engine.backward(loss)
                self.engine.step()
        keep_schedule(self.engine)
        if self.checks is not None and (step + 1) % self.config.checks.every_steps == 0:
            self.checks.check_state(f"After step {step + 1}")
        sums, data_wait, memory = self._over_ranks(self._sums(micro_batches), data_wait)
        metrics = self._losses(sums) | {"learning_rate": factor * optimizer.learning_rate} | self._grad_norm()
        slots = self.config.global_batch_size * self.config.seq_len
        metrics |= {"tokens": sums.tokens, "padding": 1 - sums.tokens / slots, "data_wait": data_wait, "memory_gib": memory}
        metrics |= {f"rows/{name}": share for name, share in self.batches.shares_consumed(step + 1).items()}
        if self.peak_flops is not None:
            flops = training_flops(self.config.model, self.vocabulary.size, sums.tokens, sums.attended)
            metrics["mfu"] = flops / (time.perf_counter() - start) / self.peak_flops / self.layout.world_size
        return metrics

    def snapshot(self) -> Snapshot:
        """The engine's state, and on rank 0 what it means; nothing random is drawn after the initial weights."""
        engine = engine_snapshot(self.engine, self.layout)
        return engine | Snapshot(objects={FACTS: to_dict(self._facts(self.engine.global_steps))}) if rank() == 0 else engine

    def load(self, folder: Path) -> None:
        """Goes on from a checkpoint of any layout."""
        facts = read_facts(folder)
        self._read_ahead.forget()
        self.batches.load_state(facts.data)
        self.batches.check_suffice(self.config.total_steps)
        load_engine(self.engine, self.layout, folder, self.config.model)
        if self.checks is not None:
            self.checks.check_state(f"After loading {folder.name}")

    @property
    def batches_read(self) -> int:
        return int(self.engine.global_steps) + self.batches.skipped

    def skip_batches(self, count: int) -> None:
        """Leaves out the rows of the next `count` steps."""
        self._read_ahead.forget()
        self.batches.skip(count)
        self.batches.check_suffice(self.config.total_steps)

    def _facts(self, step: int) -> CheckpointFacts:
        return CheckpointFacts(
            step=step,
            model=self.config.model,
            precision=self.config.precision,
            text_size=self.vocabulary.text_size,
            codebook_size=self.vocabulary.codebook_size,
            eos_id=self.batches.rows.eos_id,
            visual_tokenizer_digest=self.batches.rows.encoding.visual_tokenizer,
            layout=layout_facts(self.layout, self.config.parallel.zero_stage),
            data=self.batches.state(step),
        )

    def _micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's part of the global batch; stages in the middle of a pipeline read none."""
        if 0 < self.place.pipe < self.layout.pipe_size - 1:
            return []
        return self.batches.micro_batches(step, self.place.data, self.layout.data_size, self.config.micro_batch_size)

    def _sums(self, micro_batches: list[MicroBatch]) -> StepSums:
        sums = StepSums(*self.losses.take())
        if self.place.tensor != 0:
            return StepSums()
        if self.place.pipe == 0:
            real = [batch.document_ids != PADDING_DOCUMENT for batch in micro_batches]
            contexts = [(batch.position_ids + 1)[mask].sum().item() for batch, mask in zip(micro_batches, real, strict=True)]
            sums = sums._replace(tokens=float(sum(mask.sum().item() for mask in real)), attended=float(sum(contexts)))
        return sums

    def _over_ranks(self, sums: StepSums, data_wait: float) -> tuple[StepSums, float, float]:
        """The sums over all ranks, the longest wait and the largest memory: one collective."""
        mine = torch.tensor([*sums, data_wait, peak_memory_gib()], dtype=torch.float64, device=device())
        every = torch.empty(self.layout.world_size * len(mine), dtype=torch.float64, device=device())
        dist.all_gather_into_tensor(every, mine)
        every = every.view(self.layout.world_size, -1).cpu()
        return StepSums(*every[:, :-2].sum(0).tolist()), float(every[:, -2].max()), float(every[:, -1].max())

    @staticmethod
    def _losses(sums: StepSums) -> dict[str, float]:
        losses = {"loss": sums.loss}
        if sums.text_tokens:
            losses["text_loss"] = sums.text_loss / sums.text_tokens
        if sums.image_tokens:
            losses["image_loss"] = sums.image_loss / sums.image_tokens
        return losses

    def _grad_norm(self) -> dict[str, float]:
        return {"grad_norm": float(self.engine.get_global_grad_norm())}


def _split(batch: MicroBatch) -> tuple[tuple[torch.Tensor, ...], Targets]:
    inputs = batch.tokens, batch.position_ids, batch.document_ids
    return inputs, Targets(batch.labels, batch.loss_weight, batch.modality)
