"""RMSNorm, LLaMA's: x / rms(x) x weight over the last axis, computed in fp32, or in fp64 where `x` is."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """One kernel on GPUs, which torch has; on CPUs, where it has none, the fewest passes over memory."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., width]; returns the same."""
        if x.is_cuda:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        normalised: Tensor = _RmsNorm.apply(x, self.weight, self.eps)
        return normalised


class _RmsNorm(torch.autograd.Function):
    """Keeps its input and one number per position; by autograd alone it would keep the input in fp32, too, and pass over it twice as often."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        unit = x.to(_exact(x), copy=True)
        scale = torch.linalg.vector_norm(unit, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return unit.mul_(scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *of_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        unit = x.to(_exact(x), copy=True).mul_(scale)
        of_unit = of_outputs[0].to(unit.dtype, copy=True)
        product = of_unit * unit
        of_weight = product.reshape(-1, x.shape[-1]).sum(0)
        along = (product @ weight.to(unit.dtype)[:, None]).div_(x.shape[-1])  # mean of unit x its gradient
        of_x = of_unit.mul_(weight).addcmul_(unit, along, value=-1).mul_(scale)
        return of_x.to(x.dtype), of_weight.to(weight.dtype), None


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
