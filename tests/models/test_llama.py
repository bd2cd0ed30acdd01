"""What the language model's pure parts promise."""

import math

import pytest
import torch
from transformers import LlamaConfig as HfLlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lavit_dist.checkpoint.hf import hf_config
from lavit_dist.config.model import LlamaConfig, RopeScalingConfig
from lavit_dist.models.llama import block_parameters, rotary_angles, rotary_frequencies, training_flops


def test_angles_begin_anew_with_each_document() -> None:
    position_ids = torch.tensor([[0, 1, 2, 0, 1]])
    model = LlamaConfig(hidden_size=16, num_attention_heads=2, num_key_value_heads=2)
    angles = rotary_angles(position_ids, rotary_frequencies(model))
    assert angles.shape == (5, 1, 1, 8)
    torch.testing.assert_close(angles[3:], angles[:2])
    expected = torch.tensor([2.0 / 10000 ** (channel / 8) for channel in (0, 2, 4, 6)])
    torch.testing.assert_close(angles[2, 0, 0], torch.cat([expected, expected]))


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        RopeScalingConfig(rope_type="linear", factor=4),
        RopeScalingConfig(rope_type="llama3", factor=8, original_max_position_embeddings=512),
    ],
)
def test_frequencies_are_those_of_hugging_face(scaling) -> None:
    model = LlamaConfig(head_dim=64, rope_theta=500000.0, rope_scaling=scaling)
    theirs = LlamaRotaryEmbedding(HfLlamaConfig(**hf_config(model, 1))).inv_freq
    torch.testing.assert_close(rotary_frequencies(model), theirs, rtol=1e-6, atol=0)


def test_the_size_of_llama_7b() -> None:
    config = LlamaConfig()
    total = config.num_layers * block_parameters(config) + 2 * 32000 * config.hidden_size + config.hidden_size
    assert total == 6_738_415_616  # the released Llama-2-7B


def test_flops_of_a_document_grow_with_its_attention() -> None:
    config = LlamaConfig(hidden_size=8, num_layers=1, num_attention_heads=2, num_key_value_heads=2, ffn_hidden_size=16)
    matrices = 4 * 8 * 8 + 3 * 8 * 16 + 2 * 8  # the norms are counted too, as they are in a model's size
    head = 32 * 8
    length = 10
    flops = training_flops(config, 32, tokens=length, attended=length * (length + 1) / 2)
    assert math.isclose(flops, 6 * (matrices + head) * length + 12 * 8 * length * (length + 1) / 2)
