"""The fastest RMSNorm that is installed: apex's, Transformer Engine's, or else torch's, which is one kernel, too, on GPUs."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from lavit_dist.models.rms_norm import RMSNorm
from lavit_dist.parallel.apex import has_apex_kernels

APEX_KERNELS = "fused_layer_norm_cuda"
"""apex's extension with the kernels of its norms."""


def rms_norm(width: int, eps: float) -> nn.Module:
    """An RMSNorm with a `weight` [width], made on the CPU. Without a GPU it is ours, since the others' kernels are CUDA's."""
    if torch.cuda.is_available() and has_apex_kernels(APEX_KERNELS):
        from apex.normalization import FusedRMSNorm

        apexs: nn.Module = FusedRMSNorm(width, eps=eps)
        return apexs
    if torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None:
        from transformer_engine.pytorch import RMSNorm as TransformerEngineRMSNorm

        engines: nn.Module = TransformerEngineRMSNorm(width, eps=eps, device="cpu")
        return engines
    return RMSNorm(width, eps)
