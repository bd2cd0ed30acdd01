"""Program of the activation test: runs the blocks forward under each setting and writes what they keep for the backward pass.

    kept_on_ranks.py OUT

OUT then holds, by name, the bytes of rank 0's activations, and how many graphs of one block torch compiled for a first micro-batch
and for several of other documents.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lavit_dist.config.model import LlamaConfig
from lavit_dist.config.pretrain import ActivationCheckpointingConfig
from lavit_dist.models.vocabulary import Vocabulary
from lavit_dist.parallel.distributed import rank, world_size
from lavit_dist.parallel.topology import Layout, start_model_parallel

MODEL = LlamaConfig(hidden_size=64, num_layers=4, num_attention_heads=4, num_key_value_heads=2, ffn_hidden_size=128)
SEQ_LEN = 128


def main(out: Path) -> None:
    start_model_parallel(Layout(tensor_size=world_size(), pipe_size=1, data_size=1), 1)
    found: dict[str, int] = {}
    for sequence_parallel in (False, True):
        for mode, every in (("none", 1), ("selective", 1), ("full", 2), ("full", 1)):
            recompute = ActivationCheckpointingConfig(mode=mode, every=every)
            name = f"{mode} {every}" + (" sequence parallel" if sequence_parallel else "")
            found[name] = kept(sequence_parallel=sequence_parallel, recompute=recompute)
    found["none 1 sequence parallel, gather twice"] = kept(sequence_parallel=True, gather_twice=True)
    found["graphs"], found["graphs in all"] = graphs()
    if rank() == 0:
        out.write_text(json.dumps(found))


def kept(*, sequence_parallel: bool = False, **options: Any) -> int:
    """Bytes of the tensors that the blocks save for the backward pass, weights not counted."""
    blocks = build_blocks(sequence_parallel=sequence_parallel, **options)
    weights = {weight.untyped_storage().data_ptr() for block in blocks for weight in block.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    length = SEQ_LEN // world_size() if sequence_parallel else SEQ_LEN
    positions = torch.arange(SEQ_LEN)[None]
    state = torch.randn(length, 1, MODEL.hidden_size, requires_grad=True), positions, torch.zeros_like(positions)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for block in blocks:
            state = block(state)
    state[0].sum().backward()
    return sum(saved.values())


def graphs() -> tuple[int, int]:
    """How many graphs torch has compiled of a block after micro-batches of one document, and then of two, three and four."""
    (block, *_) = build_blocks(compiled=True)
    from torch._dynamo.utils import counters

    counts = []
    for documents in (1, 2, 3, 4):
        positions = torch.arange(SEQ_LEN)[None] % (SEQ_LEN // documents)
        document_ids = torch.arange(SEQ_LEN)[None] // (SEQ_LEN // documents)
        block((torch.randn(SEQ_LEN, 1, MODEL.hidden_size, requires_grad=True), positions, document_ids))[0].sum().backward()
        counts.append(counters["stats"]["unique_graphs"])
    return counts[0], counts[-1]


def build_blocks(*, sequence_parallel: bool = False, **options: Any) -> list[nn.Module]:
    from lavit_dist.parallel.megatron_llama import llama_layers, random_weights

    vocabulary, weights = Vocabulary(62, 64), random_weights(MODEL, 0)
    layers = llama_layers(MODEL, vocabulary, weights, sequence_parallel=sequence_parallel, **options)
    return [layer.build() for layer in layers[1:-1]]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
