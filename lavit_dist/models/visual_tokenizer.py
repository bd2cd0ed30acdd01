"""LaVIT's dynamic discrete visual tokenizer: encoder, selector, merger, quantizer, decoder (sections 3.1 and 3.2 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavit_dist.config.model import VisualTokenizerConfig
from lavit_dist.models.merger import TokenMerger
from lavit_dist.models.quantizer import VectorQuantizer
from lavit_dist.models.selector import TokenSelector, select_some
from lavit_dist.models.tokenizer_decoder import HighResolutionTokenizerDecoder, TokenizerDecoder
from lavit_dist.models.vision_encoder import VisionEncoder


class TokenizedImages(NamedTuple):
    """Codes of a batch of images."""

    codes: list[Tensor]
    """Per image [token], int64, 0 .. K - 1, in raster order of the kept patches."""
    keep_mask: Tensor
    """[batch, patch] bools."""


class TokenizerEncoder(nn.Module):
    """Selector, merger and quantizer, under the released names (`tokenizer_encoder.bin`)."""

    def __init__(self, config: VisualTokenizerConfig) -> None:
        super().__init__()
        width = config.encoder.width
        self.token_predictor = TokenSelector(width)
        self.causal_encoder = TokenMerger(width, config.merger)
        self.encode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, config.codebook.dim))
        self.quantize = VectorQuantizer(config.codebook)


class UnderstandingEncoder(nn.Module):
    """The merger that is trained with the language model, and the projection to its inputs (`visual_weight.bin`).

    Its codes would be others than those that the language model learns to draw, so the tokenizer keeps a merger of its own.
    """

    def __init__(self, config: VisualTokenizerConfig, vit_proj_dim: int) -> None:
        super().__init__()
        self.causal_encoder = TokenMerger(config.encoder.width, config.merger)
        self.vit_proj = nn.Linear(config.encoder.width, vit_proj_dim)

    def forward(self, features: Tensor, keep_mask: Tensor, *, masked: bool = False) -> Tensor:
        """Language-model inputs [token, vit_proj_dim] of the kept patches of all images: merged features that bypass the codebook.

        `features` [batch, patch, width], `keep_mask` [batch, patch] of bools. `masked` runs the merger as released, on every
        patch under masks, instead of on the kept ones alone.
        """
        return self.vit_proj(self.causal_encoder.tokens(features, keep_mask, masked=masked))


class VisualTokenizer(nn.Module):
    """From pixels to a variable number of codes, and from codes back to patch features."""

    def __init__(self, config: VisualTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = VisionEncoder(config.encoder)
        self.tokenizer_encoder = TokenizerEncoder(config)
        self.decoder = TokenizerDecoder(config)
        self.highres_decoder: HighResolutionTokenizerDecoder | None = None
        """The SDXL-shaped decoder, where a folder of weights holds one."""
        self.understanding = UnderstandingEncoder(config, config.vit_proj_dim) if config.vit_proj_dim else None
        """The second merger and `vit_proj`, where a folder of weights holds them."""

    @property
    def selector(self) -> TokenSelector:
        """The token selector (`token_predictor`)."""
        return self.tokenizer_encoder.token_predictor

    @property
    def merger(self) -> TokenMerger:
        """The token merger (`causal_encoder`)."""
        return self.tokenizer_encoder.causal_encoder

    @property
    def quantizer(self) -> VectorQuantizer:
        """The vector quantizer (`quantize`)."""
        return self.tokenizer_encoder.quantize

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Frozen patch features [batch, patch, width] of `pixel_values` [batch, 3, height, width]."""
        return self.encoder.patch_features(pixel_values)

    def tokenize(self, pixel_values: Tensor, gumbel_noise: Tensor | None) -> TokenizedImages:
        """Codes of images; see `tokenize_features`."""
        return self.tokenize_features(self.encode(pixel_values), gumbel_noise)

    def tokenize_features(self, features: Tensor, gumbel_noise: Tensor | None, *, masked: bool = False) -> TokenizedImages:
        """Codes of patch features [batch, patch, width]; `gumbel_noise` as in `choose`.

        `masked` runs the merger as released, on every patch under masks, instead of on the kept ones alone
        (`TokenMerger.merge_kept`).
        """
        keep_mask = self.choose(features, gumbel_noise)
        merged = self.merger.tokens(features, keep_mask, masked=masked)
        return TokenizedImages(list(self.codes_of(merged).split(keep_mask.sum(-1).tolist())), keep_mask)

    def codes_of(self, merged: Tensor) -> Tensor:
        """Codes [token] of merged features [token, width]."""
        return self.quantizer.assign(F.normalize(self.tokenizer_encoder.encode_task_layer(merged).float(), dim=-1))

    def choose(self, features: Tensor, gumbel_noise: Tensor | None) -> Tensor:
        """Which patches become tokens: bools [batch, patch], of patch features [batch, patch, width].

        `gumbel_noise` [batch, patch, 2] makes the selection a sample, as the released code does; None takes the arg-max.
        An image of which nothing would be kept keeps its most probable patch.
        """
        return select_some(self.selector(features), gumbel_noise)

    def pack(self, codes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Code vectors [batch, token, dim] padded to the longest image, and the bools [batch, token] that say which are there."""
        lengths = torch.tensor([len(of_image) for of_image in codes], device=codes[0].device)
        mask = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
        padded = nn.utils.rnn.pad_sequence(list(codes), batch_first=True)
        return self.quantizer.embedding(padded), mask

    def reconstruct(self, codes: Sequence[Tensor]) -> Tensor:
        """Patch features [batch, patch, width] that the decoder makes of each image's codes [token]."""
        return self.decoder(*self.pack(codes))

    def continuous_embeddings(self, features: Tensor, keep_mask: Tensor) -> Tensor:
        """Language-model inputs of the kept patches; see `UnderstandingEncoder`."""
        assert self.understanding is not None
        return self.understanding(features, keep_mask)
