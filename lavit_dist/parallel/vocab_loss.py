"""The training loss over logits whose vocabulary is shared out over tensor-parallel ranks, and what is reported of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor


class Targets(NamedTuple):
    """What the last stage needs of a micro-batch, each [batch, seq]."""

    labels: Tensor
    loss_weight: Tensor
    modality: Tensor


class LossSums(NamedTuple):
    """Sums over one process's part of the global batch since the last `take`."""

    loss: float
    text_loss: float
    text_tokens: float
    image_loss: float
    image_tokens: float


class PackedLoss:
    """Cross-entropy times `loss_weight`, summed; weights sum to 1 over the global batch, so the result doesn't depend on layout.

    DeepSpeed averages the gradients of micro-batches and of data-parallel ranks; `averaged_over`, the product of their numbers,
    undoes that. Ids from `vocabulary_size` on pad the tables and get no probability.
    """

    def __init__(self, vocabulary_size: int, averaged_over: int) -> None:
        self.vocabulary_size = vocabulary_size
        self.averaged_over = averaged_over
        self._sums = torch.zeros(len(LossSums._fields))

    def __call__(self, logits: Tensor, targets: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """`logits` [seq, batch, share of the vocabulary], overwritten; `targets` as in `Targets`. Returns a scalar."""
        labels, weight, modality = (target.t() for target in targets)
        share = logits.shape[-1]
        real = self.vocabulary_size - parallel_state.get_tensor_model_parallel_rank() * share
        logits = logits.float()
        if real < share:
            logits = logits.index_fill(-1, torch.arange(max(real, 0), share, device=logits.device), -torch.inf)
        losses = tensor_parallel.vocab_parallel_cross_entropy(logits, labels.contiguous())
        loss = (losses * weight).sum()
        self._add(losses.detach(), weight, modality, loss.detach())
        return loss * self.averaged_over

    def take(self) -> LossSums:
        """The sums, which then begin anew."""
        sums, self._sums = self._sums, torch.zeros_like(self._sums)
        return LossSums(*sums.tolist())

    def _add(self, losses: Tensor, weight: Tensor, modality: Tensor, loss: Tensor) -> None:
        supervised = weight > 0
        image = (supervised & (modality == 1)).float()
        text = supervised.float() - image
        sums = torch.stack([loss, (losses * text).sum(), text.sum(), (losses * image).sum(), image.sum()])
        self._sums = self._sums.to(sums.device) + sums
