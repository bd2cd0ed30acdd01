"""Linear layers for inference alone: in a given precision and, on a CPU, with weights that are laid out once.

PyTorch hands fp32 products on a CPU to MKL, which on an AMD processor was half as fast as oneDNN (benchmarks/tokenizer_inference.md),
and lays bf16 weights out anew in every call. These are oneDNN's operators for weights that are laid out beforehand, which
torch.compile calls when it freezes them; they need no compiler.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["none", "gelu"]
"""What follows the layer: nothing, or the exact GELU."""


class FrozenLinear(nn.Module):
    """A copy of a linear layer that doesn't train. Takes any floating type and returns its own; stays on the weight's device."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, activation: Activation = "none") -> None:
        """`weight` [out, in] and `bias` [out] are copied as `dtype`."""
        super().__init__()
        self.out_features = len(weight)
        self.dtype, self.activation = dtype, activation
        self.is_packed = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        if self.is_packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.is_packed:
            return packed_linear(x, self.weight, self.bias, self.out_features, self.activation)
        out = F.linear(x, self.weight, self.bias)
        return F.gelu(out) if self.activation == "gelu" else out


def has_bf16_layers() -> bool:
    """Whether this machine's CPU can run packed layers in bf16."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@torch.library.custom_op("lavit_dist::packed_linear", mutates_args=())
def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, activation: str) -> Tensor:
    """`x` [..., in] to [..., out]. An operator of its own, since torch.compile can't look into a packed weight."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")


@packed_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, activation: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)
