"""A small LLaMA as transformers saves it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture
def save_llama(tmp_path: Path) -> Callable[..., LlamaForCausalLM]:
    """`save_llama(folder, form=…, dtype=…, **settings)`: a LLaMA with random weights, written in one form; returns it."""

    def save(
        folder: Path, *, form: str = "safetensors", dtype: torch.dtype = torch.float32, **settings: object
    ) -> LlamaForCausalLM:
        sizes = {
            "vocab_size": 60,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**(sizes | settings))).to(dtype)
        model.save_pretrained(folder, max_shard_size="20KB" if "sharded" in form else "1GB")
        if "bin" in form:
            _as_bin(folder)
        return model

    return save


def _as_bin(folder: Path) -> None:
    """The same tensors in the files of older versions of transformers."""
    from safetensors.torch import load_file

    for path in folder.glob("*.safetensors"):
        torch.save(load_file(path), folder / path.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin"))
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        renamed = index.read_text().replace("model-0", "pytorch_model-0").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(renamed)
        index.unlink()
