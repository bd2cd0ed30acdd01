"""How well a visual tokenizer reconstructs features, with and without its quantizer, and what it spends on that."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lavit_dist.models.autoencoder import FeatureAutoencoder
from lavit_dist.models.quantizer import perplexity
from lavit_dist.models.selector import keyed_gumbel_noise, select_some
from lavit_dist.models.tokenizer_losses import reconstruction_error
from lavit_dist.models.visual_tokenizer import VisualTokenizer


@dataclass(frozen=True)
class TokenizerScores:
    """Means over images; one that comes twice counts twice."""

    images: int
    tokens: int
    """Tokens of all images."""
    reconstruction_loss: float
    """1 - cosine of a patch feature and what the decoder makes of the codes (Eq. 4)."""
    continuous_reconstruction_loss: float
    """The same without the quantizer."""
    keep_ratio: float
    codes_used: float
    """Share of the codes that some token has."""
    perplexity: float
    """Of all tokens' codes; the number of codes if all were used alike."""
    tokens_by_key: dict[str, int]
    """Tokens of each image."""


@torch.no_grad()
def score_tokenizer(
    tokenizer: VisualTokenizer, batches: Iterable[tuple[Sequence[str], Tensor]], *, seed: int | None = 0
) -> TokenizerScores:
    """Scores over batches of keys and pixels [image, 3, H, W]; patches are sampled with `seed`, or by arg-max where it is None."""
    model = FeatureAutoencoder(tokenizer)
    size = tokenizer.config.codebook.size
    counts = torch.zeros(size, dtype=torch.int64)
    sums = {True: 0.0, False: 0.0}
    images = 0
    tokens: dict[str, int] = {}
    for keys, pixel_values in batches:
        features = tokenizer.encode(pixel_values)
        noise = None if seed is None else keyed_gumbel_noise(keys, features.shape[1], seed).to(features.device)
        keep_mask = select_some(model.selector(features), noise)
        for quantize in sums:
            out = model(features, keep_mask=keep_mask, quantize=quantize)
            sums[quantize] += reconstruction_error(features, out.features).mean(-1).sum().item()
            if out.quantized is not None:
                counts += torch.bincount(out.quantized.codes, minlength=size).cpu()
        images += len(keys)
        tokens |= dict(zip(keys, keep_mask.sum(-1).tolist(), strict=True))
    return TokenizerScores(
        images=images,
        tokens=int(counts.sum()),
        reconstruction_loss=sums[True] / images,
        continuous_reconstruction_loss=sums[False] / images,
        keep_ratio=float(counts.sum()) / images / tokenizer.config.encoder.num_patches,
        codes_used=float((counts > 0).float().mean()),
        perplexity=perplexity(counts),
        tokens_by_key=tokens,
    )
