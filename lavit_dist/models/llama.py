"""What LLaMA is beyond its matrices: rotary angles, the names and shapes of its weights, and how they begin.

Names are those of Hugging Face's `LlamaForCausalLM`. A weight's initial value depends on the seed and its name alone, so that it
is the same whatever tensor and pipeline sizes the model is cut for.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from lavit_dist.config.model import LlamaConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
NEW_EMBEDDING, NEW_HEAD = "model.embed_tokens.new_rows", "lm_head.new_rows"
"""The rows of [IMG], [/IMG] and the codes, which Hugging Face has in the same tensors, after those of the text."""
RESIDUAL_OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
"""Matrices that write to the residual stream."""


def rotary_frequencies(config: LlamaConfig) -> Tensor:
    """Radians per position of each pair of channels: fp32 [head_dim / 2]."""
    channels = torch.arange(0, config.head_width, 2, dtype=torch.float32)
    frequencies = 1.0 / config.rope_theta ** (channels / config.head_width)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    # Llama 3.1: rotations slower than the first training's context are stretched, fast ones stay, a ramp lies between.
    rotations = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    ramp = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(frequencies / scaling.factor, frequencies, ramp.clamp(0, 1))


def rotary_angles(position_ids: Tensor, frequencies: Tensor) -> Tensor:
    """The rotary angles of `position_ids` [batch, seq], in radians: fp32 [seq, batch, 1, head_dim], halves alike."""
    angles = position_ids.t()[..., None].float() * frequencies.to(position_ids.device)
    return torch.cat([angles, angles], dim=-1)[:, :, None]


def block_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Names, below `model.layers.N.`, and shapes [out, in] of a decoder block's weights."""
    width, hidden = config.hidden_size, config.ffn_hidden_size
    heads_width, groups_width = (n * config.head_width for n in (config.num_attention_heads, config.num_key_value_heads))
    return {
        "input_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (heads_width, width),
        "self_attn.k_proj.weight": (groups_width, width),
        "self_attn.v_proj.weight": (groups_width, width),
        "self_attn.o_proj.weight": (width, heads_width),
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

    6 per weight of a matrix and token (PaLM, appendix B; the embedding is a look-up), and 12 x the heads' channels per attended
    position and layer for scores and weighted values.
    """
    weights = config.num_layers * block_parameters(config) + vocabulary_size * config.hidden_size
    return 6.0 * weights * tokens + 12.0 * config.num_layers * config.num_attention_heads * config.head_width * attended
