"""What a language-model checkpoint is made of, and its weights read without any process group.

STEP/llama.json                                      sizes, layout and data state
STEP/deepspeed/layer_NN-model_TT-model_states.pt     weights, with pipeline stages: one file per layer and tensor rank
STEP/deepspeed/mp_rank_TT_model_states.pt            weights, without: all layers of a tensor rank
STEP/zero3_weights_TT.pt                             the same under ZeRO-3, whose own files hold slices
STEP/deepspeed/*_optim_states.pt                     optimizer state
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lavit_dist.config.base import build, config, to_dict
from lavit_dist.config.model import LlamaConfig
from lavit_dist.errors import UserError
from lavit_dist.models.llama import EMBEDDING, FINAL_NORM, HEAD, block_name
from lavit_dist.models.vocabulary import Vocabulary
from lavit_dist.parallel.llama_shards import join_block, join_table
from lavit_dist.parallel.topology import Layout

FACTS = "llama.json"
DEEPSPEED_FOLDER = "deepspeed"
EMBEDDING_LAYER = 0
"""Number of the embedding in the list of layers; blocks follow, then the head."""
LayerShares = list[dict[str, Tensor]]
"""One layer's weights under megatron-core's names, per tensor-parallel rank."""


@config
class CheckpointFacts:
    """What a reader must know of a checkpoint before it opens a weight file."""

    model: LlamaConfig
    precision: str
    text_size: int
    codebook_size: int
    eos_id: int
    visual_tokenizer_digest: str | None
    """None where it was trained on text alone."""
    layout: dict[str, int]
    """Sizes that decide how the files are cut."""
    data: dict[str, Any]
    """`GlobalBatches.state`."""


def write_facts(folder: Path, facts: CheckpointFacts) -> None:
    """Writes STEP/llama.json."""
    (folder / FACTS).write_text(json.dumps(to_dict(facts), indent=1))


def read_facts(folder: Path) -> CheckpointFacts:
    """Reads STEP/llama.json; raises `UserError` when `folder` is not a checkpoint of the language model."""
    path = folder / FACTS
    if not path.exists():
        raise UserError(f"{folder} is not a checkpoint of the language model: {FACTS} is missing; give RUN_DIR/checkpoints/step-*.")
    return build(CheckpointFacts, json.loads(path.read_text()), source=str(path))


def layout_facts(layout: Layout, zero_stage: int) -> dict[str, int]:
    """What decides how a checkpoint's files are cut."""
    return {
        "tensor_parallel_size": layout.tensor_size,
        "pipeline_parallel_size": layout.pipe_size,
        "data_parallel_size": layout.data_size,
        "zero_stage": zero_stage,
    }


def check_layout(folder: Path, layout: Layout, zero_stage: int) -> None:
    """Raises `UserError` unless the checkpoint in `folder` was written by a run of this layout."""
    there, here = read_facts(folder).layout, layout_facts(layout, zero_stage)
    if there != here:
        then, now = (", ".join(f"{name} {value}" for name, value in facts.items()) for facts in (there, here))
        raise UserError(
            f"The checkpoint {folder} was written with {then}, but this run has {now}; start it with the same sizes and the same"
            " number of processes, or give a new run_dir."
        )


def gather_zero3_weights(module: nn.Module, folder: Path, *, tensor_rank: int, writes: bool) -> None:
    """Writes this tensor rank's whole weights, one parameter in memory at a time per data rank. Collective over data ranks."""
    import deepspeed

    weights = {}
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if writes:
                weights[name] = parameter.detach().cpu().clone()
    if writes:
        torch.save(weights, folder / f"zero3_weights_{tensor_rank:02d}.pt")


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The whole model in `folder` under Hugging Face's names, layer by layer, put together from every rank's files.

    The tables have `Vocabulary.size` rows: the padding of shares is left out.
    """
    facts = read_facts(folder)
    tables = Vocabulary(facts.text_size, facts.codebook_size).tables
    shares = _layer_reader(folder, facts)

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


def _layer_reader(folder: Path, facts: CheckpointFacts) -> Callable[[int], LayerShares]:
    """A function from a layer's number to its shares."""
    ranks = range(facts.layout["tensor_parallel_size"])
    files = folder / DEEPSPEED_FOLDER
    if facts.layout["pipeline_parallel_size"] > 1:
        return lambda layer: [_load(files / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt") for rank in ranks]
    if facts.layout["zero_stage"] == 3:
        whole = [_load(folder / f"zero3_weights_{rank:02d}.pt") for rank in ranks]
    else:
        whole = [_load(files / f"mp_rank_{rank:02d}_model_states.pt")["module"] for rank in ranks]
    by_layer: dict[int, LayerShares] = defaultdict(lambda: [{} for _ in ranks])
    for rank, weights in enumerate(whole):
        for name, tensor in weights.items():
            layer, _, rest = name.partition(".")
            by_layer[int(layer)][rank][rest] = tensor
    return by_layer.__getitem__


def _load(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"The checkpoint file {path} is missing; give a complete step folder.")
    loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return loaded


def _below(prefix: str, share: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in share.items()}
