"""What LLaMA is beyond its matrices: rotary angles, RMSNorm, the names and shapes of its weights, and how they begin.

Names are those of Hugging Face's `LlamaForCausalLM`. A weight's initial value depends on the seed and its name alone, so that it
is the same whatever tensor and pipeline sizes the model is cut for.
"""

from __future__ import annotations

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavit_dist.config.model import LlamaConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
RESIDUAL_OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
"""Matrices that write to the residual stream."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_angles(position_ids: Tensor, head_dim: int, theta: float) -> Tensor:
    """The rotary angles of `position_ids` [batch, seq], in radians: fp32 [seq, batch, 1, head_dim], halves alike."""
    channels = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32)
    angles = position_ids.t()[..., None].float() * (1.0 / theta ** (channels / head_dim))
    return torch.cat([angles, angles], dim=-1)[:, :, None]


def block_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Names, below `model.layers.N.`, and shapes [out, in] of a decoder block's weights."""
    width, hidden = config.hidden_size, config.ffn_hidden_size
    groups_width = config.num_key_value_heads * (width // config.num_attention_heads)
    return {
        "input_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (width, width),
        "self_attn.k_proj.weight": (groups_width, width),
        "self_attn.v_proj.weight": (groups_width, width),
        "self_attn.o_proj.weight": (width, width),
        "post_attention_layernorm.weight": (width,),
        "mlp.gate_proj.weight": (hidden, width),
        "mlp.up_proj.weight": (hidden, width),
        "mlp.down_proj.weight": (width, hidden),
    }


def block_name(layer: int, name: str = "") -> str:
    """The full name of weight `name` of decoder block `layer`, from 0."""
    return f"model.layers.{layer}.{name}"


def initial_weight(config: LlamaConfig, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The fp32 weight `name` before training: ones for norms, else normal with the standard deviation of its kind (GPT-2's)."""
    if len(shape) == 1:
        return torch.ones(shape)
    std = config.init_std
    if name.endswith(RESIDUAL_OUTPUTS):
        std /= math.sqrt(2 * config.num_layers)
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.empty(shape).normal_(std=std, generator=generator)


def block_parameters(config: LlamaConfig) -> int:
    """Numbers in one decoder block."""
    return sum(math.prod(shape) for shape in block_shapes(config).values())


def training_flops(config: LlamaConfig, vocabulary_size: int, tokens: float, attended: float) -> float:
    """Floating-point operations of forward and backward over `tokens` tokens, which attend to `attended` positions in all.

    6 per weight of a matrix and token (PaLM, appendix B; the embedding is a look-up), and 12 x width per attended position and
    layer for scores and weighted values.
    """
    weights = config.num_layers * block_parameters(config) + vocabulary_size * config.hidden_size
    return 6.0 * weights * tokens + 12.0 * config.num_layers * config.hidden_size * attended
