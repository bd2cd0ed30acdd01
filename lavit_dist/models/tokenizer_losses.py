"""What the visual tokenizer is trained for: Eq. 4 of the paper, and a signal for its selector."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lavit_dist.models.visual_tokenizer import Reconstruction


def reconstruction_loss(target: Tensor, reconstructed: Tensor) -> Tensor:
    """Mean of 1 - cos(x, x_rec) over patches [batch, patch, width], a scalar (Eq. 4)."""
    return 1 - F.cosine_similarity(target.float(), reconstructed.float(), dim=-1).mean()


def rate_loss(keep_ratio: Tensor, target_keep_ratio: float) -> Tensor:
    """(rho - mean M)^2 of the mean over a whole batch, a scalar, so that images may differ (Eq. 4)."""
    return (target_keep_ratio - keep_ratio).square()


def guidance_loss(target: Tensor, out: Reconstruction, target_keep_ratio: float) -> Tensor:
    """Cross-entropy of dropped patches' keep probabilities against whether they should have been kept, a scalar.

    Of the patches [batch, patch, width] that were dropped, those that came back worst should have been kept: a share of
    `target_keep_ratio` over the batch at hand, so that an image with more to tell gets more tokens. What is dropped should be drawn at
    random (`random_keep_ratio`): where the selector draws it, what it keeps is never tested, and it runs away.
    """
    dropped = out.keep_mask.detach() == 0
    if not dropped.any():
        return out.log_probs.new_zeros(())
    error = 1 - F.cosine_similarity(target.float(), out.features.detach().float(), dim=-1)[dropped]
    wanted = (error > torch.quantile(error, 1 - target_keep_ratio)).to(error.dtype)
    keep, drop = out.log_probs[dropped].unbind(-1)
    return -(wanted * keep + (1 - wanted) * drop).mean()
