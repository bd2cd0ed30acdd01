"""A decoder block as megatron-core builds it: its settings, its parts, and attention over packed rows in the place of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lavit_dist.config.model import LlamaConfig
from lavit_dist.models.packed_attention import PackedDocuments, packed_attention
from lavit_dist.models.transformer_engine import TransformerEngineAttention
from lavit_dist.parallel.fused_norm import rms_norm
from lavit_dist.parallel.swiglu import GatedActivation


class PackedCoreAttention(nn.Module):
    """What megatron-core calls core attention, over packed rows; it takes `PackedDocuments` in the place of a mask."""

    def __init__(self, attention: str, recompute: bool, config: TransformerConfig, **_: Any) -> None:
        super().__init__()
        self.recompute = recompute
        self.attend: Callable[[Tensor, Tensor, Tensor, PackedDocuments], Tensor] = packed_attention
        if attention == "transformer_engine":
            tensor_size = config.tensor_model_parallel_size
            heads, groups = (of // tensor_size for of in (config.num_attention_heads, config.num_query_groups))
            self.attend = TransformerEngineAttention(heads, groups, config.kv_channels)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: PackedDocuments, **_: Any) -> Tensor:
        if self.recompute:
            value = value.contiguous()  # it is part of one tensor with queries and keys before rotation, which would be kept for it
            attended: Tensor = checkpoint(
                self.attend, query, key, value, attention_mask, use_reentrant=False, preserve_rng_state=False
            )
            return attended
        return self.attend(query, key, value, attention_mask)


class KeptInputLinear(tensor_parallel.ColumnParallelLinear):
    """A column-parallel layer that, under sequence parallelism, keeps its input as gathered for the backward pass.

    megatron-core's own keeps the rank's share and gathers the rest again: less memory, half as many bytes more to send.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.gathers = bool(self.config.sequence_parallel)
        if self.gathers:
            self.sequence_parallel = False
            self.disable_grad_reduce = True  # the gradient is summed where it is scattered

    def forward(self, input_: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        whole = tensor_parallel.gather_from_sequence_parallel_region(input_) if self.gathers else input_
        output: tuple[Tensor, Tensor | None] = super().forward(whole, *arguments, **named)
        return output


class BlockNorm:
    """`rms_norm`, built with the arguments that megatron-core gives a norm; a spec wants a class."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float) -> nn.Module:  # type: ignore[misc]
        return rms_norm(hidden_size, eps)


def transformer_config(model: LlamaConfig, sequence_parallel: bool) -> TransformerConfig:
    """megatron-core's settings of the blocks; its groups must exist."""
    # Pipeline size stays 1 here: cutting the list of layers is DeepSpeed's part.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TransformerConfig(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_key_value_heads,
            kv_channels=model.head_width,
            layernorm_epsilon=model.rms_norm_eps,
            normalization="RMSNorm",
            activation_func=F.silu,
            gated_linear_unit=True,
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            tensor_model_parallel_size=int(parallel_state.get_tensor_model_parallel_world_size()),
            sequence_parallel=sequence_parallel,
            use_cpu_initialization=True,
            perform_initialization=False,
            gradient_accumulation_fusion=False,
            bias_activation_fusion=False,
            use_te_activation_func=True,  # any module is meant: `GatedActivation`
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            apply_rope_fusion=False,
        )


def block_spec(attention: str, *, recompute_attention: bool, gather_twice: bool) -> ModuleSpec:
    """What megatron-core builds a block of; `attention` and `gather_twice` are the settings of those names."""
    column_linear = tensor_parallel.ColumnParallelLinear if gather_twice else KeptInputLinear
    core_attention = ModuleSpec(module=PackedCoreAttention, params={"attention": attention, "recompute": recompute_attention})
    submodules = SelfAttentionSubmodules(
        linear_qkv=column_linear,
        core_attention=core_attention,
        linear_proj=tensor_parallel.RowParallelLinear,
    )
    mlp = MLPSubmodules(linear_fc1=column_linear, activation_func=GatedActivation, linear_fc2=tensor_parallel.RowParallelLinear)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=BlockNorm,
            self_attention=ModuleSpec(module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=submodules),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=BlockNorm,
            mlp=ModuleSpec(module=MLP, submodules=mlp),
            mlp_bda=get_bias_dropout_add,
        ),
    )
