"""What patterns freeze, and which group each parameter goes to."""

import pytest
import torch
from torch import nn

from lavit_dist.config.model import LlamaConfig
from lavit_dist.config.parameters import LearningRateScales, ParametersConfig
from lavit_dist.config.training import OptimizerConfig
from lavit_dist.engine.llama_parameters import BLOCK_NAMES, OUTER_NAMES, frozen_names, hugging_face_names, llama_groups
from lavit_dist.errors import UserError
from lavit_dist.models.llama import EMBEDDING, FINAL_NORM, HEAD, NEW_EMBEDDING, NEW_HEAD, block_name, block_shapes

MODEL = LlamaConfig(num_layers=2)
EVERY_NAME = {*OUTER_NAMES.values(), *(block_name(layer, name) for layer in range(2) for name in block_shapes(MODEL))}


def layers() -> nn.Module:
    """Parameters under the names that a stage gives them, without megatron-core."""
    module = nn.Module()
    below = {"0": ("text", "visual"), "3": ("norm.weight", "projection.text", "projection.visual")}
    for layer in "12":
        below[layer] = tuple(f"layer.{name}" for name in BLOCK_NAMES)
    for layer, names in below.items():
        for name in names:
            parts, holder = f"{layer}.{name}".split("."), module
            for part in parts[:-1]:
                if part not in dict(holder.named_children()):
                    holder.add_module(part, nn.Module())
                holder = holder.get_submodule(part)
            shape = (3,) if "norm" in name else (3, 3)
            holder.register_parameter(parts[-1], nn.Parameter(torch.zeros(shape)))
    return module


def test_every_weight_is_held_by_one_parameter():
    held = [name for parameter, _ in layers().named_parameters() for name in hugging_face_names(parameter)]
    assert sorted(held) == sorted(EVERY_NAME)


@pytest.mark.parametrize(
    ("patterns", "free"),
    [
        (["model.layers.*"], {EMBEDDING, HEAD, NEW_EMBEDDING, NEW_HEAD, FINAL_NORM}),
        (["model.layers.*", "*norm*", EMBEDDING, HEAD], {NEW_EMBEDDING, NEW_HEAD}),
    ],
)
def test_patterns_cover_what_they_match(patterns, free):
    assert EVERY_NAME - frozen_names(MODEL, patterns) == free


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["model.layer.*"], r"'model\.layer\.\*' matches no parameter"),
        (["model.layers.0.*", "model.layers.7.*"], r"'model\.layers\.7\.\*' matches no parameter"),
        (["*"], "nothing would be trained"),
        (
            ["*.q_proj.*"],
            r"one matrix here; add a pattern for model\.layers\.0\.self_attn\.k_proj\.weight, model\.layers\.0\.self_attn\.v",
        ),
        (["model.layers.1.mlp.gate*"], r"add a pattern for model\.layers\.1\.mlp\.up_proj\.weight"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(patterns, message):
    with pytest.raises(UserError, match=message):
        frozen_names(MODEL, patterns)


@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_groups_go_by_kind(decay_embeddings):
    scales = LearningRateScales(new_rows=4.0, embeddings=0.5, body=2.0)
    module, optimizer = layers(), OptimizerConfig(learning_rate=0.1, weight_decay=0.3)
    parameters = ParametersConfig(learning_rate_scale=scales, decay_embeddings=decay_embeddings)
    groups = llama_groups(module, optimizer, parameters)
    found = {id(parameter): (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]}
    for name, parameter in module.named_parameters():
        table = name.endswith(("text", "visual"))
        rate = 0.4 if name.endswith("visual") else 0.05 if name.endswith("text") else 0.2
        decay = 0.0 if "norm" in name or (table and not decay_embeddings) else 0.3
        assert found[id(parameter)] == (pytest.approx(rate), decay), name
