"""Settings of pretraining that can't go together: each is refused by a sentence that says why and what to choose instead."""

from typing import Any

import pytest

from lavit_dist.config.base import build
from lavit_dist.config.mixture import weights_from_steps
from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.errors import UserError

LEGAL: dict[str, Any] = {
    "run_dir": "run",
    "ids": "ids",
    "text_tokenizer": "text",
    "model": {"num_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64, "ffn_hidden_size": 128},
    "total_steps": 1,
    "global_batch_size": 8,
    "micro_batch_size": 2,
    "seq_len": 128,
}
SOURCES = {"pairs": {"ids": "ids/train", "weight": 0.7}, "text": {"ids": "text/train", "max_epochs": 2}}
MIXTURE: dict[str, Any] = {"ids": None, "sources": SOURCES, "total_steps": 100}
REFUSALS = [
    ({"ids": None}, "Neither ids nor sources is set; give ids the folder of an id set, or sources several by name."),
    (
        {"sources": SOURCES},
        "ids ids is one id set, and sources (pairs, text) are several; keep one of these settings, for one set or a mixture.",
    ),
    (
        {"curriculum": [{"from_step": 1, "weights": {}}]},
        "curriculum has no meaning with the one id set of ids; leave it out, or name id sets under sources.",
    ),
    ({"weigh_by": "documents"}, "weigh_by has no meaning with the one id set of ids"),
    (
        MIXTURE | {"sources": {"a.b": {"ids": "ids"}}},
        "sources has the name 'a.b'; names may hold letters, digits, _ and -: choose one of those.",
    ),
    (MIXTURE | {"sources": {"text": {"ids": "ids", "max_epochs": 0}}}, "sources.text.max_epochs = 0 is not legal"),
    (MIXTURE | {"sources": {"text": {"ids": "ids", "wieght": 1}}}, "did you mean 'sources.text.weight'?"),
    (
        MIXTURE | {"sources": {"text": {"ids": "ids", "weight": 0}}},
        "From step 0 on every source has the weight 0; give one a weight in sources.",
    ),
    (
        MIXTURE | {"curriculum": [{"from_step": 10, "weights": {"pairs": 0, "text": 0}}]},
        "From step 10 on every source has the weight 0; give one a weight in curriculum from_step 10.",
    ),
    (
        MIXTURE | {"curriculum": [{"from_step": 10, "weights": {"pears": 1}}]},
        "curriculum from_step 10 weighs pears, which sources lacks; choose of pairs, text.",
    ),
    (
        MIXTURE | {"curriculum": [{"from_step": 10, "weights": {}}, {"from_step": 10, "weights": {}}]},
        "curriculum has from_step 10 after 10, with total_steps 100; let steps rise, below total_steps.",
    ),
    (
        MIXTURE | {"curriculum": [{"from_step": 100, "weights": {"pairs": 1}}]},
        "curriculum has from_step 100 after 0, with total_steps 100; let steps rise, below total_steps.",
    ),
    (
        {"optimizer": {"schedule": "wsd"}, "total_steps": 7},
        "total_steps 7 with optimizer.decay_share 0.2 and a warm-up of 0 leaves the schedule wsd fewer than 2 steps to fall in, the first"
        " of which is at the peak; raise total_steps or optimizer.decay_share, or choose the schedule cosine.",
    ),
    (
        {"optimizer": {"schedule": "wsd", "warmup_steps": 99}, "total_steps": 100},
        "total_steps 100 with optimizer.decay_share 0.2 and a warm-up of 99 leaves the schedule wsd fewer than 2 steps to fall in",
    ),
    (
        {"optimizer": {"schedule": "constant", "min_learning_rate": 1e-5}},
        "optimizer.min_learning_rate 1e-05 has no meaning with the schedule constant; leave it out, or set optimizer.schedule to cosine or"
        " wsd.",
    ),
    (
        {"optimizer": {"decay_shape": "linear"}},
        "optimizer.decay_shape linear has no meaning with the schedule cosine; leave it out, or set optimizer.schedule to wsd.",
    ),
    (
        {"documents": {"text_loss_weight": 0, "image_loss_weight": 0}},
        "documents.text_loss_weight and documents.image_loss_weight are both 0, so that nothing would be learned; set one of them to 1.",
    ),
    (
        {"parallel": {"sequence_parallel": True}},
        "parallel.sequence_parallel shares the sequence out to tensor-parallel processes, but parallel.tensor_parallel_size is 1; set"
        " parallel.sequence_parallel to false, or parallel.tensor_parallel_size to 2 or more.",
    ),
    (
        {"parallel": {"sequence_parallel": True, "tensor_parallel_size": 4}, "seq_len": 127},
        "seq_len 127 can't be shared out to parallel.tensor_parallel_size 4 processes, as parallel.sequence_parallel asks; choose 128,"
        " or set parallel.sequence_parallel to false.",
    ),
    (
        {"parallel": {"zero_stage": 3, "pipeline_parallel_size": 2}},
        "parallel.zero_stage 3 can't be combined with parallel.pipeline_parallel_size 2, whose micro-batches need whole gradients; set"
        " parallel.zero_stage to 0 or 1, or parallel.pipeline_parallel_size to 1.",
    ),
    (
        {"parallel": {"offload_optimizer": True, "zero_stage": 0}},
        "parallel.offload_optimizer moves the optimizer state that ZeRO shares out, but parallel.zero_stage is 0; set"
        " parallel.zero_stage to 1, or parallel.offload_optimizer to false.",
    ),
    (
        {"parallel": {"offload_optimizer": True, "pipeline_parallel_size": 2}},
        "parallel.offload_optimizer can't be combined with parallel.pipeline_parallel_size 2, whose stages are there to make the state"
        " fit; set parallel.offload_optimizer to false, or parallel.pipeline_parallel_size to 1.",
    ),
    (
        {"parallel": {"offload_parameters": True, "zero_stage": 2}},
        "parallel.offload_parameters moves the weights that ZeRO-3 gathers layer by layer, but parallel.zero_stage is 2; set"
        " parallel.zero_stage to 3, or parallel.offload_parameters to false.",
    ),
    (
        {"activation_checkpointing": {"mode": "full", "every": 0}},
        "activation_checkpointing.every 0 must be at least 1.",
    ),
    (
        {"activation_checkpointing": {"every": 2}},
        "activation_checkpointing.every 2 does nothing where activation_checkpointing.mode is none; set the mode to selective or full,"
        " or leave every at 1.",
    ),
    (
        {"activation_checkpointing": {"mode": "full", "every": 5}},
        "activation_checkpointing.every 5 is more than model.num_layers 4, so that no block would be recomputed; choose at most 4.",
    ),
    (
        {"compile": True, "parallel": {"zero_stage": 3}},
        "compile can't be combined with parallel.zero_stage 3, whose weights come and go between a block's operators; set compile to"
        " false, or parallel.zero_stage to 2.",
    ),
    (
        {"parallel": {"tensor_parallel_size": 3}},
        "model.num_attention_heads 8 can't be shared out to parallel.tensor_parallel_size 3 processes; set"
        " parallel.tensor_parallel_size to 2, which divides the model's heads and channels.",
    ),
    (
        {"parallel": {"tensor_parallel_size": 8}},
        "model.num_key_value_heads 4 can't be shared out to parallel.tensor_parallel_size 8 processes; set"
        " parallel.tensor_parallel_size to 4, which divides the model's heads and channels.",
    ),
    (
        {"parallel": {"pipeline_parallel_size": 5}},
        "parallel.pipeline_parallel_size 5 is more than model.num_layers 4; every stage needs a layer, so choose at most 4.",
    ),
    (
        {"parallel": {"zero_stage": 0}, "precision": "bf16"},
        "precision bf16 needs the fp32 master weights that ZeRO keeps, but parallel.zero_stage is 0; set it to 1, or precision to fp32.",
    ),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSALS)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        build(PretrainConfig, LEGAL | changes)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parallel": {"sequence_parallel": True, "tensor_parallel_size": 4, "pipeline_parallel_size": 2}},
        {"parallel": {"offload_optimizer": True, "offload_parameters": True, "zero_stage": 3}},
        {"activation_checkpointing": {"mode": "selective", "every": 4}, "compile": True},
        {"optimizer": {"schedule": "wsd", "decay_shape": "linear", "min_learning_rate": 1e-5}, "total_steps": 8},
        MIXTURE | {"curriculum": [{"from_step": 10, "weights": {"pairs": 0}}, {"from_step": 20, "weights": {"pairs": 1}}]},
        MIXTURE | {"weigh_by": "documents"},
    ],
)
def test_what_goes_together_is_not(changes: dict[str, Any]) -> None:
    build(PretrainConfig, LEGAL | changes)


def test_a_curriculum_leaves_the_weights_that_it_does_not_name() -> None:
    curriculum = [{"from_step": 10, "weights": {"pairs": 0}}, {"from_step": 20, "weights": {"text": 0.5, "pairs": 2}}]
    value = build(PretrainConfig, LEGAL | MIXTURE | {"curriculum": curriculum})
    assert weights_from_steps(value.sources, value.curriculum) == [
        (0, {"pairs": 0.7, "text": 1.0}),
        (10, {"pairs": 0.0, "text": 1.0}),
        (20, {"pairs": 2.0, "text": 0.5}),
    ]
