"""Which of the language model's parameters are trained, and in which optimizer groups; all by Hugging Face's names.

megatron-core holds query, key and value in one parameter, and gate and up in another: those are trained, or frozen, together.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lavit_dist.config.model import LlamaConfig
from lavit_dist.config.parameters import LearningRateScales, ParametersConfig
from lavit_dist.config.training import OptimizerConfig
from lavit_dist.engine.schedule import parameter_groups
from lavit_dist.errors import UserError, check
from lavit_dist.models.llama import EMBEDDING, FINAL_NORM, HEAD, NEW_EMBEDDING, NEW_HEAD, block_name
from lavit_dist.parallel.distributed import gather_objects
from lavit_dist.parallel.llama_shards import GATE_UP, QKV, SAME_TENSOR
from lavit_dist.parallel.topology import Layout

OUTER_NAMES = {
    "text": EMBEDDING,
    "visual": NEW_EMBEDDING,
    "norm.weight": FINAL_NORM,
    "projection.text": HEAD,
    "projection.visual": NEW_HEAD,
}
"""Parameters of embedding and head, below the number of their layer."""
BLOCK_NAMES = {ours: (theirs,) for ours, theirs in SAME_TENSOR.items()} | {
    QKV: tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
    GATE_UP: ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}
"""megatron-core's parameters of a block, and what each holds."""


def hugging_face_names(name: str) -> tuple[str, ...]:
    """What the parameter `name` of the list of layers (`0.text`, `3.layer.mlp.linear_fc2.weight`, …) holds."""
    layer, _, below = name.partition(".")
    if below in OUTER_NAMES:
        return (OUTER_NAMES[below],)
    return tuple(block_name(int(layer) - 1, part) for part in BLOCK_NAMES[below.removeprefix("layer.")])


def frozen_names(model: LlamaConfig, patterns: Iterable[str]) -> set[str]:
    """The names that `parameters.freeze` covers. Raises `UserError` for patterns that can't be meant."""
    blocks = [[block_name(layer, part) for part in parts] for layer in range(model.num_layers) for parts in BLOCK_NAMES.values()]
    held_together = [[name] for name in OUTER_NAMES.values()] + blocks
    frozen: set[str] = set()
    for pattern in patterns:
        matched = {name for names in held_together for name in names if fnmatchcase(name, pattern)}
        check(
            bool(matched),
            f"parameters.freeze {pattern!r} matches no parameter; names are like {EMBEDDING}, {NEW_EMBEDDING},"
            f" {block_name(0, 'mlp.up_proj.weight')}, {HEAD}, and * stands for anything.",
        )
        frozen |= matched
    for names in held_together:
        free = [name for name in names if name not in frozen]
        check(
            not free or len(free) == len(names),
            f"parameters.freeze covers a part of {', '.join(names)}, which are one matrix here; add a pattern for {', '.join(free)}, or"
            " leave all of them out.",
        )
    everything = len(frozen) == sum(map(len, held_together))
    check(not everything, "parameters.freeze covers every parameter, so that nothing would be trained; leave some out.")
    return frozen


def freeze(module: nn.Module, model: LlamaConfig, parameters: ParametersConfig, layout: Layout) -> None:
    """Freezes what `parameters` says of a stage's layers. Collective; raises `UserError` on all ranks if a stage has nothing to train.

    Such a stage would have no optimizer, and the first one no gradient to begin its backward pass with.
    """
    frozen = frozen_names(model, parameters.freeze)
    for name, parameter in module.named_parameters():
        if frozen.issuperset(hugging_face_names(name)):
            parameter.requires_grad_(False)
    trains = gather_objects(any(parameter.requires_grad for parameter in module.parameters()))
    idle = sorted({layout.coordinates(other).pipe for other, some in enumerate(trains) if not some})
    if idle:
        raise UserError(
            f"parameters.freeze leaves pipeline stage {', '.join(map(str, idle))} of {layout.pipe_size} without anything to train, which"
            " a pipeline can't run; lower parallel.pipeline_parallel_size (1 always works), or leave a parameter of each stage free."
        )


def llama_groups(module: nn.Module, optimizer: OptimizerConfig, parameters: ParametersConfig) -> list[dict[str, Any]]:
    """Optimizer groups of a stage's trainable parameters: by weight decay, and by learning rate."""
    scales, without_decay = {}, []
    for name, parameter in module.named_parameters():
        held = hugging_face_names(name)[0]
        scales[parameter] = _scale(held, parameters.learning_rate_scale)
        if held in (EMBEDDING, HEAD, NEW_EMBEDDING, NEW_HEAD) and not parameters.decay_embeddings:
            without_decay.append(parameter)
    return parameter_groups(module.parameters(), optimizer, scales, without_decay)


def _scale(name: str, scales: LearningRateScales) -> float:
    if name in (NEW_EMBEDDING, NEW_HEAD):
        return scales.new_rows
    return scales.embeddings if name in (EMBEDDING, HEAD) else scales.body
