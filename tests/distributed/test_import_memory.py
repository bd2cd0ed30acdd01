"""Starting from a LLaMA folder never holds the model: at most a file and the rank's own part."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

PROGRAM = Path(__file__).with_name("import_memory_on_ranks.py")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """400 MB in fp32, in files of at most 110 MB."""
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 8192}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model.save_pretrained(folder, max_shard_size="110MB")
    return folder


@pytest.mark.parametrize(("tensor", "pipeline", "data"), [(1, 2, 1), (2, 1, 1), (1, 1, 2)])
def test_peak_memory_is_at_most_a_file_and_the_own_part(run_ranks, llama, tmp_path, monkeypatch, tensor, pipeline, data):
    # The C library keeps freed blocks of up to 32 MB for later. A real model's matrices are larger; this one's stand for them.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    run_ranks(PROGRAM, 2, str(llama), str(tensor), str(pipeline), str(data), str(tmp_path), timeout=200)
    sizes = [path.stat().st_size for path in llama.glob("*.safetensors")]
    assert len(sizes) > 3
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["own"] < 0.6 * sum(sizes)
        assert found["taken"] <= max(sizes) + found["own"], found
