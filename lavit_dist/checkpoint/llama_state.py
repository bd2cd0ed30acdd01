"""What a language-model checkpoint is made of, and its weights read without any process group.

STEP/llama.json   sizes, layout and data state
STEP/weights/     weights, fp32 masters and optimizer state; see `lavit_dist.checkpoint.weight_parts`
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lavit_dist.checkpoint.weight_parts import WeightParts
from lavit_dist.config.base import build, config
from lavit_dist.config.model import LlamaConfig
from lavit_dist.errors import UserError
from lavit_dist.files import read_json
from lavit_dist.models.llama import EMBEDDING, FINAL_NORM, HEAD, block_name
from lavit_dist.models.vocabulary import Vocabulary
from lavit_dist.parallel.llama_shards import join_block, join_table
from lavit_dist.parallel.topology import Layout

FACTS = "llama.json"
WEIGHTS_FOLDER = "weights"
EMBEDDING_LAYER = 0
"""Number of the embedding in the list of layers; blocks follow, then the head."""
LayerShares = list[dict[str, Tensor]]
"""One layer's weights under megatron-core's names, per tensor-parallel rank."""


@config
class CheckpointFacts:
    """What a reader must know of a checkpoint before it opens a weight file."""

    step: int
    """Optimizer steps taken."""
    model: LlamaConfig
    precision: str
    text_size: int
    codebook_size: int
    eos_id: int
    visual_tokenizer_digest: str | None
    """None where it was trained on text alone."""
    layout: dict[str, int]
    """Sizes of the run that wrote it, for who wonders; any other may go on from it."""
    data: dict[str, Any]
    """`GlobalBatches.state`."""


def read_facts(folder: Path) -> CheckpointFacts:
    """Reads STEP/llama.json; raises `UserError` when `folder` is not a checkpoint of the language model."""
    path = folder / FACTS
    if not path.exists():
        raise UserError(f"{folder} is not a checkpoint of the language model: {FACTS} is missing; give RUN_DIR/checkpoints/step-*.")
    return build(CheckpointFacts, read_json(path, "give another step folder"), source=str(path))


def layout_facts(layout: Layout, zero_stage: int) -> dict[str, int]:
    """The sizes of a run."""
    return {
        "tensor_parallel_size": layout.tensor_size,
        "pipeline_parallel_size": layout.pipe_size,
        "data_parallel_size": layout.data_size,
        "zero_stage": zero_stage,
    }


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The whole model in `folder` under Hugging Face's names, layer by layer, in the precision that it computed in.

    The tables have `Vocabulary.size` rows: the padding of shares is left out.
    """
    facts = read_facts(folder)
    dtype = torch.bfloat16 if facts.precision == "bf16" else torch.float32  # of masters it is the rounded form
    yield from ((name, tensor.to(dtype)) for name, tensor in _whole_weights(folder, facts))


def _whole_weights(folder: Path, facts: CheckpointFacts) -> Iterator[tuple[str, Tensor]]:
    tables = Vocabulary(facts.text_size, facts.codebook_size).tables
    shares = _layer_reader(folder)

    def whole_table(layer: LayerShares, prefix: str = "") -> Tensor:
        return torch.cat([join_table([share[prefix + table.name] for share in layer], table) for table in tables])

    yield EMBEDDING, whole_table(shares(EMBEDDING_LAYER))
    for index in range(facts.model.num_layers):
        block = [_below("layer.", share) for share in shares(index + 1)]
        for name, tensor in join_block(block, facts.model).items():
            yield block_name(index, name), tensor
    head = shares(facts.model.num_layers + 1)
    yield FINAL_NORM, head[0]["norm.weight"]
    yield HEAD, whole_table(head, "projection.")


def _layer_reader(folder: Path) -> Callable[[int], LayerShares]:
    """A function from a layer's number to its shares."""
    saved = WeightParts(folder / WEIGHTS_FOLDER)
    by_layer: dict[int, list[str]] = defaultdict(list)
    for name in saved.names:
        by_layer[int(name.partition(".")[0])].append(name)

    def shares(layer: int) -> LayerShares:
        found: LayerShares = [{} for _ in range(saved.tensor_size)]
        for name in by_layer[layer]:
            of_ranks = saved.shares(name)
            for rank, weights in enumerate(found):
                weights[name.partition(".")[2]] = of_ranks[rank % len(of_ranks)]
        return found

    return shares


def _below(prefix: str, share: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in share.items()}
