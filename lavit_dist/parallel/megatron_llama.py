"""LLaMA from megatron-core's layers, as the list of layers that a pipeline is cut from: embedding, blocks, head.

What travels between them is `(hidden [seq, batch, width], position_ids, document_ids)`, the last two [batch, seq] of integers:
masks and rotary angles are made anew on each pipeline stage, because DeepSpeed wants a gradient for every float that it sends.
Under sequence parallelism `hidden` is a tensor rank's share [seq / tensor, batch, width] of the sequence; the integers stay whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lavit_dist.config.model import LlamaConfig
from lavit_dist.config.pretrain import ActivationCheckpointingConfig
from lavit_dist.models.llama import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    NEW_EMBEDDING,
    NEW_HEAD,
    block_name,
    block_shapes,
    initial_weight,
    rotary_angles,
    rotary_frequencies,
)
from lavit_dist.models.packed_attention import PackedDocuments
from lavit_dist.models.vocabulary import Table, Vocabulary
from lavit_dist.parallel.fused_norm import rms_norm
from lavit_dist.parallel.llama_shards import SHARD_AXIS, cut_block
from lavit_dist.parallel.megatron_block import block_spec, transformer_config
from lavit_dist.parallel.vocab_loss import VocabularyProjection, mark_sharded, table_share, vocabulary_shard

Hidden = tuple[Tensor, Tensor, Tensor]
Weights = Callable[[str, tuple[int, ...]], Tensor]
"""The whole weight of a Hugging Face name and a shape [out, in]. The rows of [IMG], [/IMG] and the codes have names of their own,
`NEW_EMBEDDING` and `NEW_HEAD`; `EMBEDDING` and `HEAD` are those of the text."""
KEEP_ACTIVATIONS = ActivationCheckpointingConfig()


class StageInputs:
    """What the blocks of a stage need to know of a micro-batch, computed by the first of them and shared by all."""

    def __init__(self, model: LlamaConfig) -> None:
        self.frequencies = rotary_frequencies(model)
        self._document_ids: Tensor | None = None

    def of(self, position_ids: Tensor, document_ids: Tensor) -> tuple[PackedDocuments, Tensor]:
        """The documents of the micro-batch, and its rotary angles."""
        if self._document_ids is not document_ids:
            self._document_ids = document_ids
            self._computed = PackedDocuments.of(document_ids), rotary_angles(position_ids, self.frequencies)
        return self._computed


class Embedding(nn.Module):
    """The embedding, its rows shared out over tensor-parallel ranks."""

    def __init__(self, model: LlamaConfig, vocabulary: Vocabulary, weights: Weights, sequence_parallel: bool) -> None:
        super().__init__()
        self.sequence_parallel = sequence_parallel
        self.tables = vocabulary.tables
        wholes = _table_rows(model, vocabulary, weights, (EMBEDDING, NEW_EMBEDDING))
        self.text, self.visual = (vocabulary_shard(table, whole) for table, whole in zip(self.tables, wholes, strict=True))

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor]) -> Hidden:
        """`tokens`, `position_ids`, `document_ids`, each [batch, seq]."""
        tokens, position_ids, document_ids = inputs
        text, visual = (self._look_up(tokens, *part) for part in zip(self.tables, (self.text, self.visual), strict=True))
        rows = (text + visual).transpose(0, 1).contiguous()
        if self.sequence_parallel:
            hidden = tensor_parallel.reduce_scatter_to_sequence_parallel_region(rows)
        else:
            hidden = tensor_parallel.reduce_from_tensor_model_parallel_region(rows)
        return hidden, position_ids, document_ids

    @staticmethod
    def _look_up(tokens: Tensor, table: Table, rows: Tensor) -> Tensor:
        """The rows of those tokens that this rank holds, zeros for the others."""
        share = table_share(table)
        row = tokens - share.first_id
        mine = (row >= 0) & (row < share.rows)
        return F.embedding(row.masked_fill(~mine, 0), rows).masked_fill(~mine[..., None], 0.0)


class Block(nn.Module):
    """A decoder block, which recomputes its activations as `recompute` says."""

    def __init__(
        self,
        config: TransformerConfig,
        model: LlamaConfig,
        index: int,
        stage: StageInputs,
        weights: Weights,
        recompute: ActivationCheckpointingConfig,
        attention: str,
        gather_twice: bool,
        compiled: bool,
    ) -> None:
        super().__init__()
        self.stage = stage
        mode = recompute.mode if recompute.recomputes(index) else "none"
        self.recomputed = mode == "full"
        spec = block_spec(attention, recompute_attention=mode == "selective", gather_twice=gather_twice)
        self.layer = build_module(spec, config=config, layer_number=index + 1)
        if compiled:
            core = self.layer.self_attention.core_attention  # its shapes are those of the documents, new in each micro-batch
            core.forward = torch.compiler.disable(core.forward)
            self.layer.compile()
        rank, size = _tensor_rank(), _tensor_size()
        whole = {name: weights(block_name(index, name), shape) for name, shape in block_shapes(model).items()}
        load_parameters(self.layer, cut_block(whole, model, rank, size))
        for name, axis in SHARD_AXIS.items():
            mark_sharded(self.layer.get_parameter(name), axis)
        if config.sequence_parallel:
            for norm in (self.layer.input_layernorm, self.layer.pre_mlp_layernorm):
                _sum_gradient_over_tensor_ranks(norm)

    def forward(self, inputs: Hidden) -> Hidden:
        hidden, position_ids, document_ids = inputs
        documents, angles = self.stage.of(position_ids, document_ids)
        if self.recomputed:  # nothing in a block is random, so no random state is kept for the second time
            hidden = checkpoint(self._transform, hidden, documents, angles, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden = self._transform(hidden, documents, angles)
        return hidden, position_ids, document_ids

    def _transform(self, hidden: Tensor, documents: PackedDocuments, angles: Tensor) -> Tensor:
        transformed: Tensor = self.layer(hidden, attention_mask=documents, rotary_pos_emb=angles)[0]
        return transformed


class Head(nn.Module):
    """The final norm; `projection`, which the engine calls on its result and the targets, gives the loss."""

    def __init__(self, model: LlamaConfig, vocabulary: Vocabulary, weights: Weights, sequence_parallel: bool, **loss: Any) -> None:
        """`loss` are the arguments that `VocabularyProjection` takes by name."""
        super().__init__()
        self.norm = rms_norm(model.hidden_size, model.rms_norm_eps)
        load_parameters(self.norm, {"weight": weights(FINAL_NORM, (model.hidden_size,))})
        wholes = _table_rows(model, vocabulary, weights, (HEAD, NEW_HEAD))
        self.projection = VocabularyProjection(vocabulary.tables, wholes, sequence_parallel=sequence_parallel, **loss)
        if sequence_parallel:
            _sum_gradient_over_tensor_ranks(self.norm)

    def forward(self, inputs: Hidden) -> Tensor:
        hidden: Tensor = self.norm(inputs[0])
        return hidden


def llama_layers(
    model: LlamaConfig,
    vocabulary: Vocabulary,
    weights: Weights,
    *,
    sequence_parallel: bool = False,
    recompute: ActivationCheckpointingConfig = KEEP_ACTIVATIONS,
    attention: str = "torch",
    gather_twice: bool = False,
    compiled: bool = False,
    **loss: Any,
) -> list[LayerSpec]:
    """The embedding, the blocks and the head, in order, not yet built: a stage builds its own, and asks `weights` for them alone.

    `attention` and `gather_twice` are the settings of those names. `compiled` blocks are compiled by torch, apart from their attention. `loss` are the
    arguments that `VocabularyProjection` takes by name. megatron-core's groups must exist.
    """
    config, stage = transformer_config(model, sequence_parallel), StageInputs(model)
    return [
        LayerSpec(Embedding, model, vocabulary, weights, sequence_parallel),
        *(
            LayerSpec(Block, config, model, index, stage, weights, recompute, attention, gather_twice, compiled)
            for index in range(model.num_layers)
        ),
        LayerSpec(Head, model, vocabulary, weights, sequence_parallel, **loss),
    ]


def random_weights(model: LlamaConfig, seed: int) -> Weights:
    """Weights before any training; they depend on `seed` alone, not on how the model is cut."""
    return lambda name, shape: initial_weight(model, name, shape, seed)


def no_weights(name: str, shape: tuple[int, ...]) -> Tensor:
    """`Weights` of a run whose checkpoint replaces them all: drawing them would be for nothing."""
    return torch.zeros(shape)


@torch.no_grad()
def load_parameters(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies `weights` to `module`'s parameters, which must bear these names; megatron-core and Transformer Engine have other state."""
    parameters = dict(module.named_parameters())
    if parameters.keys() != weights.keys():
        raise AssertionError(f"parameters {sorted(parameters)}, weights {sorted(weights)}")
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def _table_rows(model: LlamaConfig, vocabulary: Vocabulary, weights: Weights, names: tuple[str, str]) -> Iterator[Tensor]:
    """The rows of the text and of the visual table, one after the other so that one at a time is whole in memory."""
    return (weights(name, (table.size, model.hidden_size)) for name, table in zip(names, vocabulary.tables, strict=True))


def _sum_gradient_over_tensor_ranks(norm: nn.Module) -> None:
    """For the weight of a norm, which all tensor ranks hold, each of which has the gradient of its share of the sequence alone.

    A hook on the gradient, because every engine, whatever it does with gradients later, lets them pass here first.
    """

    def sum_over_ranks(gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
        return total

    norm.get_parameter("weight").register_hook(sum_over_ranks)


def _tensor_rank() -> int:
    return int(parallel_state.get_tensor_model_parallel_rank())


def _tensor_size() -> int:
    return int(parallel_state.get_tensor_model_parallel_world_size())
