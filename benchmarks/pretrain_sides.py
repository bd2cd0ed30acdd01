"""The ways to train one LLaMA that `pretrain.py` compares: ours, and its rivals. All begin with the same weights."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from lavit_rows import LavitBatches
from torch import Tensor, nn

from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.data.micro_batch import MicroBatch
from lavit_dist.models.llama import EMBEDDING, FINAL_NORM, HEAD, NEW_EMBEDDING, NEW_HEAD, block_name, block_shapes, initial_weight
from lavit_dist.models.vocabulary import Vocabulary
from lavit_dist.parallel.distributed import device
from lavit_dist.parallel.host_memory import keep_freed_memory
from lavit_dist.parallel.topology import Layout, start_model_parallel

Step = Callable[[], float]
"""One optimizer step over the whole global batch; returns its loss."""
IGNORED = -100
"""Label that transformers' loss leaves out."""


def ours(config: PretrainConfig, batches: LavitBatches) -> Step:
    """The library's engine, as a run uses it."""
    layout = _one_process(config)
    from lavit_dist.engine.pretraining import Pretraining

    training = Pretraining(config, layout, batches)
    return lambda: training.train_step(0)["loss"]


def ours_compiled(config: PretrainConfig, batches: LavitBatches) -> Step:
    """The same with `compile: true`."""
    return ours(dataclasses.replace(config, compile=True), batches)


def hf_padded(config: PretrainConfig, batches: LavitBatches, *, compiled: bool = False) -> Step:
    """transformers' LLaMA on documents padded to the longest of their forward pass, which takes the documents that one of ours takes."""
    model, optimizer = _hf_model(config, batches.rows.vocabulary, compiled)
    inputs = []
    for start in range(0, config.global_batch_size, config.micro_batch_size):
        rows = batches.row_documents[start : start + config.micro_batch_size]
        chosen = [torch.from_numpy(document) for row in rows for document in row]
        tokens = nn.utils.rnn.pad_sequence(chosen, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(document) for document in chosen], batch_first=True)
        inputs.append({"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, IGNORED)})
    return lambda: _hf_step(model, optimizer, inputs, batches.supervised)


def hf_padded_with_memory_kept(config: PretrainConfig, batches: LavitBatches) -> Step:
    """`hf_padded` with freed memory kept, as our engine keeps it: what page faults cost transformers."""
    keep_freed_memory()
    return hf_padded(config, batches)


def hf_packed(config: PretrainConfig, batches: LavitBatches, *, compiled: bool = False) -> Step:
    """transformers' LLaMA on packed rows: from position ids that begin anew it makes the mask of documents, for torch's SDPA.

    Its path without any mask needs FlashAttention, and so a GPU.
    """
    model, optimizer = _hf_model(config, batches.rows.vocabulary, compiled)
    inputs = []
    for batch in batches.micro_batches(0, 0, 1, 1):  # it finds documents in rows of one each
        labels = batch.tokens.masked_fill((batch.position_ids == 0) | (batch.document_ids < 0), IGNORED)
        inputs.append({"input_ids": batch.tokens, "position_ids": batch.position_ids, "labels": labels})
    return lambda: _hf_step(model, optimizer, inputs, batches.supervised)


def megatron(config: PretrainConfig, batches: LavitBatches) -> Step:
    """megatron-core's GPTModel by its local spec, on packed rows with a mask of documents."""
    _one_process(config)
    from megatron.core import tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from lavit_dist.parallel.llama_shards import cut_block
    from lavit_dist.parallel.megatron_block import transformer_config

    # its attention forks a CUDA random state for a dropout that is 0
    tensor_parallel.get_cuda_rng_tracker = lambda: SimpleNamespace(fork=contextlib.nullcontext)
    llama, vocabulary = config.model, batches.rows.vocabulary
    settings = transformer_config(llama, sequence_parallel=False)
    model = GPTModel(
        dataclasses.replace(settings, use_te_activation_func=False, bias_activation_fusion=True),  # our blocks bring an activation
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=vocabulary.size,
        max_sequence_length=config.seq_len,
        position_embedding_type="rope",
        rotary_base=int(llama.rope_theta),
    )
    weights = _initial_weights(config, vocabulary)
    state = {
        "embedding.word_embeddings.weight": weights[EMBEDDING],
        "decoder.final_layernorm.weight": weights[FINAL_NORM],
        "output_layer.weight": weights[HEAD],
    }
    for index in range(llama.num_layers):
        block = {name: weights[block_name(index, name)] for name in block_shapes(llama)}
        state |= {f"decoder.layers.{index}.{name}": weight for name, weight in cut_block(block, llama, 0, 1).items()}
    _check_loaded(model.load_state_dict(state, strict=False))
    model.to(device(), _dtype(config))
    optimizer = Optimizer(model, config)
    micro_batches = [_on_device(batch) for batch in batches.micro_batches(0, 0, 1, config.micro_batch_size)]
    causal = torch.ones(config.seq_len, config.seq_len, dtype=torch.bool, device=device()).triu(1)
    masks = [(causal | (b.document_ids[:, None] != b.document_ids[:, :, None]))[:, None] for b in micro_batches]

    def step() -> float:
        total = 0.0
        for batch, mask in zip(micro_batches, masks, strict=True):
            losses = model(batch.tokens, batch.position_ids, mask, labels=batch.labels)
            loss = (losses.float() * batch.loss_weight).sum()
            loss.backward()
            total += loss.item()
        optimizer.step()
        return total

    return step


class Optimizer:
    """torch's fused AdamW on fp32 weights, which a model in bf16 gets back rounded; gradients are clipped as in a run."""

    def __init__(self, model: nn.Module, config: PretrainConfig) -> None:
        settings = config.optimizer
        self.clipping = settings.gradient_clipping
        self.parameters = list(model.parameters())
        self.masters = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in self.parameters]
        matrices, vectors = ([m for m in self.masters if (m.dim() > 1) is many] for many in (True, False))
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True)

    def step(self) -> None:
        separate = [(p, master) for p, master in zip(self.parameters, self.masters, strict=True) if p is not master]
        for parameter, master in separate:
            master.grad = parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(self.masters, self.clipping)
        self.adamw.step()
        self.adamw.zero_grad()
        with torch.no_grad():
            for parameter, master in separate:
                parameter.copy_(master)


SIDES: dict[str, Callable[[PretrainConfig, LavitBatches], Step]] = {
    "ours": ours,
    "ours, compiled": ours_compiled,
    "HF, padded batches": hf_padded,
    "HF, padded batches, compiled": functools.partial(hf_padded, compiled=True),
    "HF, padded batches, memory kept": hf_padded_with_memory_kept,
    "HF, packed rows": hf_packed,
    "HF, packed rows, compiled": functools.partial(hf_packed, compiled=True),
    "megatron-core GPTModel": megatron,
}


def _on_device(batch: MicroBatch) -> MicroBatch:
    return MicroBatch(**{name: tensor.to(device()) for name, tensor in vars(batch).items()})


def _one_process(config: PretrainConfig) -> Layout:
    layout = Layout(1, 1, 1)
    start_model_parallel(layout, config.num_threads)
    return layout


def _hf_model(config: PretrainConfig, vocabulary: Vocabulary, compiled: bool) -> tuple[Any, Optimizer]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from lavit_dist.checkpoint.hf import hf_config

    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    hf = LlamaConfig(
        **hf_config(config.model, vocabulary.size),
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(hf)
    _check_loaded(model.load_state_dict(_initial_weights(config, vocabulary), strict=False))
    model.to(device(), _dtype(config)).train()
    if compiled:
        model.compile(dynamic=True)  # lengths of padded batches differ
    return model, Optimizer(model, config)


def _hf_step(model: Any, optimizer: Optimizer, inputs: list[dict[str, Tensor]], supervised: int) -> float:
    total = 0.0
    for batch in inputs:
        batch = {name: tensor.to(device()) for name, tensor in batch.items()}
        loss = model(**batch, num_items_in_batch=supervised).loss
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


def _initial_weights(config: PretrainConfig, vocabulary: Vocabulary) -> dict[str, Tensor]:
    """All weights under Hugging Face's names, as our engine starts with them."""
    llama = config.model
    shapes: dict[str, tuple[int, ...]] = {FINAL_NORM: (llama.hidden_size,)}
    for index in range(llama.num_layers):
        shapes |= {block_name(index, name): shape for name, shape in block_shapes(llama).items()}
    weights = {name: initial_weight(llama, name, shape, config.seed) for name, shape in shapes.items()}
    for name, new in ((EMBEDDING, NEW_EMBEDDING), (HEAD, NEW_HEAD)):
        rows = (
            initial_weight(llama, of, (table.size, llama.hidden_size), config.seed)
            for of, table in zip((name, new), vocabulary.tables, strict=True)
        )
        weights[name] = torch.cat(list(rows))
    return weights


def _check_loaded(keys: Any) -> None:
    missing = [name for name in keys.missing_keys if not name.endswith("_extra_state")]
    if missing or keys.unexpected_keys:
        raise AssertionError(f"missing {missing}, unexpected {keys.unexpected_keys}")


def _dtype(config: PretrainConfig) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]
