"""The trained path of the visual tokenizer: from frozen patch features to their reconstruction, with gradients (Eq. 4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavit_dist.models.quantizer import Quantized, VectorQuantizer
from lavit_dist.models.selector import TokenSelector, select_straight_through
from lavit_dist.models.visual_tokenizer import VisualTokenizer


class Reconstruction(NamedTuple):
    """What a training step needs of the forward pass."""

    features: Tensor
    """Reconstructed patch features [batch, patch, width]."""
    keep_mask: Tensor
    """[batch, patch]: bools, or zeros and ones with a straight-through gradient."""
    unit: Tensor
    """Unit vectors of the kept patches before quantization [token, dim], image after image, fp32."""
    quantized: Quantized | None
    """Their codes, or None where the quantizer is off."""
    log_probs: Tensor | None
    """The selector's log-probabilities [batch, patch, 2], where it learns."""


class FeatureAutoencoder(nn.Module):
    """Everything of a tokenizer that can be trained, without its tower: selector, merger, quantizer and decoder."""

    def __init__(self, tokenizer: VisualTokenizer) -> None:
        super().__init__()
        self.tokenizer_encoder = tokenizer.tokenizer_encoder
        self.decoder = tokenizer.decoder

    @property
    def selector(self) -> TokenSelector:
        """The token selector (`token_predictor`)."""
        return self.tokenizer_encoder.token_predictor

    @property
    def quantizer(self) -> VectorQuantizer:
        """The vector quantizer (`quantize`)."""
        return self.tokenizer_encoder.quantize

    def part(self, name: str) -> nn.Module:
        """What a setting calls selector, merger, projection, codebook or decoder."""
        encoder = self.tokenizer_encoder
        return {
            "selector": encoder.token_predictor,
            "merger": encoder.causal_encoder,
            "projection": encoder.encode_task_layer,
            "codebook": encoder.quantize,
            "decoder": self.decoder,
        }[name]

    def forward(
        self,
        features: Tensor,
        *,
        keep_mask: Tensor | None = None,
        gumbel_noise: Tensor | None = None,
        temperature: float = 1.0,
        quantize: bool,
        with_log_probs: bool = False,
    ) -> Reconstruction:
        """Reconstructs patch features [batch, patch, width] from some of their patches.

        With `keep_mask` [batch, patch] of bools, those: see `reconstruct_kept`, which `with_log_probs` belongs to. Otherwise those of
        the selector's own choice under `gumbel_noise` [batch, patch, 2]: see `select_and_reconstruct`, which takes `temperature`.
        """
        if keep_mask is not None:
            return self.reconstruct_kept(features, keep_mask, quantize=quantize, with_log_probs=with_log_probs)
        assert gumbel_noise is not None
        return self.select_and_reconstruct(features, gumbel_noise, temperature=temperature, quantize=quantize)

    def reconstruct_kept(
        self, features: Tensor, keep_mask: Tensor, *, quantize: bool, with_log_probs: bool = False
    ) -> Reconstruction:
        """Only kept tokens are computed, so no gradient reaches the selection; `with_log_probs` runs the selector for its own loss."""
        log_probs = self.selector(features) if with_log_probs else None
        merged = self.tokenizer_encoder.causal_encoder.merge_kept(features, keep_mask)
        unit, quantized = self._discretise(self.tokenizer_encoder.encode_task_layer(merged), quantize)
        vectors = quantized.vectors if quantized else unit
        lengths = keep_mask.sum(-1)
        padded = nn.utils.rnn.pad_sequence(list(vectors.split(lengths.tolist())), batch_first=True)
        present = torch.arange(padded.shape[1], device=lengths.device) < lengths[:, None]
        return Reconstruction(self.decoder(padded, present), keep_mask, unit, quantized, log_probs)

    def select_and_reconstruct(
        self, features: Tensor, gumbel_noise: Tensor, *, temperature: float, quantize: bool
    ) -> Reconstruction:
        """Every position is computed and masks say what is kept (Eq. 1), so that the gradient of the reconstruction reaches the
        selector both through the merger's masks and through the decoder's.
        """
        log_probs = self.selector(features)
        keep_mask = select_straight_through(log_probs, gumbel_noise, temperature)
        kept = keep_mask.detach() > 0
        vectors = self.tokenizer_encoder.encode_task_layer(self.tokenizer_encoder.causal_encoder(features, keep_mask))
        unit, quantized = self._discretise(vectors[kept], quantize)
        chosen = quantized.vectors if quantized else unit
        memory = torch.zeros_like(vectors, dtype=unit.dtype).masked_scatter(kept[..., None], chosen)
        dropped = F.normalize(vectors.float(), dim=-1) * ~kept[..., None]
        return Reconstruction(self.decoder(memory + dropped, keep_mask), keep_mask, unit, quantized, log_probs)

    def _discretise(self, vectors: Tensor, quantize: bool) -> tuple[Tensor, Quantized | None]:
        unit = F.normalize(vectors.float(), dim=-1)
        return unit, self.quantizer(unit) if quantize else None
