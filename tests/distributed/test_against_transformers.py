"""Logits of packed documents in a layout are those of transformers' LlamaForCausalLM, which reads each document alone."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lavit_dist.checkpoint.llama_folder import LlamaFolder
from lavit_dist.evaluation.llama_check import LIMIT, check_llama
from lavit_dist.parallel.topology import Layout
from pipelines import verify

SIZES = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def save(folder: Path, groups: int, **settings) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_key_value_heads=groups, max_position_embeddings=256, initializer_range=0.1, **settings)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("groups", [8, 4], ids=["MHA", "GQA"])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_logits_are_those_of_transformers(tmp_path, groups, tensor, pipeline):
    differences = check_llama(LlamaFolder(save(tmp_path, groups)), Layout(tensor, pipeline, 1))
    assert len(differences) > 4
    assert all(found.largest > 100 * LIMIT for found in differences)
    assert max(found.difference for found in differences) <= LIMIT


def test_an_export_with_codes_scaled_positions_and_its_own_head_width(tmp_path):
    folder = save(tmp_path, 4, rope_parameters=LLAMA3, head_dim=16, tie_word_embeddings=True)
    (folder / "lavit.json").write_text(json.dumps({"text_size": 120, "codebook_size": 78}))
    assert all(found.ok for found in check_llama(LlamaFolder(folder), Layout(2, 1, 1)))


def test_a_difference_is_told(tmp_path, monkeypatch, capsys):
    folder, plain = save(tmp_path, 8), LlamaForCausalLM.from_pretrained

    def altered(*arguments, **settings):
        model = plain(*arguments, **settings)
        with torch.no_grad():
            model.model.norm.weight[0] += 0.01
        return model

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", altered)
    assert not verify.hf(str(folder), 1, 1)
    printed = capsys.readouterr().out
    assert "FAIL" in printed
    assert "documents FAIL" in printed
