"""SwiGLU, silu(gate) x up, by kernels that torch brings along compiled."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class SwiGLU(torch.autograd.Function):
    """Keeps its input alone, and computes the gate again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        """`gate_and_up` [..., 2 x hidden]; returns [..., hidden]."""
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *of_outputs: Tensor) -> Tensor:
        (of_hidden,) = of_outputs
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, -1)
        of_gate = torch.ops.aten.silu_backward(of_hidden * up, gate)
        return torch.cat((of_gate, F.silu(gate).mul_(of_hidden)), -1)


class GatedActivation(nn.Module):
    """What megatron-core's MLP has between its layers. On GPUs megatron-core's own SwiGLU, which is for torch's compiler to fuse; without
    the compiler that is ten kernels, so the one above stands in for it elsewhere.
    """

    def __init__(self, config: TransformerConfig) -> None:
        """A spec's module is given megatron-core's `config`; there is nothing to set."""
        super().__init__()

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """`gate_and_up` [seq, batch, 2 x hidden]; returns [seq, batch, hidden]."""
        hidden: Tensor = bias_swiglu_impl(gate_and_up, None) if gate_and_up.is_cuda else SwiGLU.apply(gate_and_up)
        return hidden
