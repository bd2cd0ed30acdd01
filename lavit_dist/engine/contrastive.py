"""Contrastive training of a vision tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lavit_dist.checkpoint.snapshot import Snapshot
from lavit_dist.config.tower import TrainTowerConfig
from lavit_dist.data.hashing import stable_hash
from lavit_dist.data.pair_batches import PairBatches
from lavit_dist.data.text_tokenizer import TextTokenizer
from lavit_dist.engine.data_parallel import DataParallelEngine
from lavit_dist.models.contrastive import ContrastiveModel, contrastive_loss
from lavit_dist.parallel.distributed import device, gather, gather_with_gradient, mean_over_ranks, world_size

SKIPPED = "batches_skipped"


class ContrastiveTraining:
    """A `Trainable`: CLIP's loss over the global batch of pairs."""

    memory_advice = "Start more processes, or lower global_batch_size, which also decides how many pairs are told apart."

    def __init__(self, config: TrainTowerConfig, model: ContrastiveModel, text: TextTokenizer, batches: PairBatches) -> None:
        self.config = config
        self.text = text
        self.batches = batches
        self.skipped = 0
        """How many batches were left out."""
        self.engine = DataParallelEngine(
            model.to(device()),
            optimizer=config.optimizer,
            total_steps=config.total_steps,
            micro_batch_size=config.global_batch_size // world_size(),
            precision=config.precision,
        )

    def train_step(self, step: int) -> Mapping[str, float]:
        batch = self.batches.batch(step + self.skipped)
        ids, mask = self._encode(batch.captions)
        pictures, captions, scale = self.engine.module(batch.pixel_values.to(device()), ids, mask)
        pictures, captions = gather_with_gradient(pictures.float()), gather_with_gradient(captions.float())
        same = _equal(batch.captions) | _equal(batch.keys)
        loss = contrastive_loss(pictures, captions, scale, same)
        accuracy = same.gather(1, (pictures @ captions.t()).argmax(-1, keepdim=True)).float().mean()
        metrics = {"loss": loss.item(), "retrieval_accuracy": accuracy.item()}
        self.engine.backward(loss)
        return mean_over_ranks(metrics) | self.engine.step() | {"images": float(self.config.global_batch_size)}

    def snapshot(self) -> Snapshot:
        return self.engine.snapshot({}, {SKIPPED: self.skipped})

    def load(self, folder: Path) -> None:
        _, facts = self.engine.load(folder, (SKIPPED,))
        self.skipped = facts[SKIPPED]

    @property
    def batches_read(self) -> int:
        return self.engine.steps + self.skipped

    def skip_batches(self, count: int) -> None:
        self.skipped += count

    def _encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [batch, token], padded to the longest caption."""
        rows = [torch.tensor(self.text.encode(caption)[: self.config.text.max_tokens]) for caption in captions]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return ids.to(device()), (torch.arange(ids.shape[1]) < lengths[:, None]).to(device())


def _equal(words: Sequence[str]) -> Tensor:
    """Bools [pair, pair] over the global batch, of which `words` is this rank's share: which of them are the same."""
    hashes = gather(torch.tensor([stable_hash(word) >> 1 for word in words], device=device()))
    return hashes[:, None] == hashes[None]
