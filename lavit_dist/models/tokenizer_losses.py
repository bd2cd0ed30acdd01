"""What the visual tokenizer is trained for: Eq. 4 of the paper in its readings, and a signal for its selector.

Sums over a whole global batch enter as arguments, so that the gradient doesn't depend on how the batch is shared out to ranks and to
backward passes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lavit_dist.config.tokenizer import RateConfig


def reconstruction_error(target: Tensor, reconstructed: Tensor) -> Tensor:
    """1 - cos(x, x_rec) of each patch, [batch, patch] of [batch, patch, width]; its mean is the first term of Eq. 4."""
    return 1 - F.cosine_similarity(target.float(), reconstructed.float(), dim=-1)


def rate_loss(keep_mask: Tensor, batch_keep_ratio: float, rate: RateConfig) -> Tensor:
    """The second term of Eq. 4 without its weight, a scalar, of part of a batch.

    `keep_mask` [image, patch] carries the gradient. `batch_keep_ratio` is the mean over the global batch, which the
    squared distance is taken of: the mean of this loss over all parts then has the gradient of (rho - mean M)^2.
    """
    per_image = keep_mask.mean(-1)
    if rate.per == "image":
        return (rate.keep_ratio - per_image).square().mean()
    mean = batch_keep_ratio + (per_image.mean() - per_image.mean().detach())
    loss = (rate.keep_ratio - mean).square()
    if rate.per == "range":
        loss = loss + (F.relu(rate.lowest - per_image) + F.relu(per_image - rate.highest)).square().mean()
    return loss


def guidance_loss(error: Tensor, keep_mask: Tensor, log_probs: Tensor, threshold: float, dropped: float) -> Tensor:
    """Cross-entropy of dropped patches' keep probabilities against whether they should have been kept, divided by `dropped`, a scalar.

    Of the patches [batch, patch] that were dropped, those whose reconstruction `error` is above `threshold` should have been kept, so
    that an image with more to tell gets more tokens. What is dropped should be drawn at random (`selection: random`): where the
    selector draws it, what it keeps is never tested, and it runs away. `log_probs` [batch, patch, 2] carries the gradient.
    """
    wanted = (error.detach() > threshold).to(log_probs.dtype)
    keep, drop = log_probs.unbind(-1)
    return -((wanted * keep + (1 - wanted) * drop) * ~keep_mask).sum() / max(1.0, dropped)


def commitment_loss(unit: Tensor, codes: Tensor, tokens: float) -> Tensor:
    """Squared distance of unit vectors to their codes [token, dim], summed and divided by `tokens`, a scalar."""
    return (unit - codes.detach()).square().sum() / tokens


def codebook_loss(unit: Tensor, codes: Tensor, tokens: float) -> Tensor:
    """The same with the gradient in the codes: how the first VQ-VAE moves its codebook."""
    return (unit.detach() - codes).square().sum() / tokens


def likeness_loss(unit: Tensor, lengths: Tensor) -> Tensor:
    """The mean cosine between two vectors of one image, averaged over images, a scalar.

    `unit` [token, dim] are unit vectors, image after image; `lengths` [image] says how many each has. Where all tokens of an image come
    to be alike, few codes serve it, and with few images at a time few codes are in use.
    """
    owner = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    sums = unit.new_zeros(len(lengths), unit.shape[1]).index_add_(0, owner, unit)
    pairs = (lengths * (lengths - 1)).clamp_min(1)
    return ((sums.square().sum(-1) - lengths) / pairs).mean()


def error_quantile(errors: Tensor, share: float) -> float:
    """The value that a share `share` of the errors [any] lies above; torch's own quantile takes no more than 2^24 of them."""
    rank = min(errors.numel() - 1, int((1 - share) * errors.numel()))
    return float(errors.flatten().kthvalue(rank + 1).values)
