"""Export of a language-model checkpoint as a Hugging Face `LlamaForCausalLM` folder.

FOLDER/config.json, model*.safetensors           the model; the embedding has `Vocabulary.size` rows
FOLDER/tokenizer.json, tokenizer_config.json, …  a tokenizer of text, [IMG], [/IMG] and codes
FOLDER/text_tokenizer/                           the text tokenizer, as it was given
FOLDER/lavit.json                                how ids beyond the text are to be read
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lavit_dist.checkpoint.llama_folder import LAVIT
from lavit_dist.checkpoint.llama_state import CheckpointFacts, read_facts, read_weights
from lavit_dist.config.base import to_dict
from lavit_dist.config.model import LlamaConfig
from lavit_dist.data.image_tokens import copy_text_tokenizer, write_mixed_tokenizer
from lavit_dist.data.text_tokenizer import TEXT_TOKENIZER, TextTokenizer
from lavit_dist.models.vocabulary import Vocabulary

MAX_FILE_BYTES = 5_000_000_000
"""Size at which another safetensors file is begun (transformers' own choice)."""


def export_hf(checkpoint: Path, folder: Path, text_tokenizer: str | Path) -> None:
    """Writes the checkpoint in `checkpoint`, of any layout, to `folder`. It needs no process group and holds the model once."""
    facts = read_facts(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    text = TextTokenizer.load(text_tokenizer).folder
    write_mixed_tokenizer(text, folder, Vocabulary(facts.text_size, facts.codebook_size))
    copy_text_tokenizer(text, folder / TEXT_TOKENIZER)
    _write_weights(checkpoint, folder)
    (folder / "config.json").write_text(json.dumps(_described(facts), indent=2))
    meaning = {name: getattr(facts, name) for name in ("text_size", "codebook_size", "eos_id", "visual_tokenizer_digest")}
    (folder / LAVIT).write_text(json.dumps(meaning, indent=2))


def _write_weights(checkpoint: Path, folder: Path) -> None:
    parts: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in read_weights(checkpoint):
        if filled and filled + tensor.nbytes > MAX_FILE_BYTES:
            parts.append({})
            filled = 0
        parts[-1][name] = tensor.contiguous().clone()  # safetensors refuses views of shared memory
        filled += tensor.nbytes
    names = [f"model-{index:05d}-of-{len(parts):05d}.safetensors" for index in range(1, len(parts) + 1)]
    if len(parts) == 1:
        names = ["model.safetensors"]
    for file, weights in zip(names, parts, strict=True):
        save_file(weights, folder / file, metadata={"format": "pt"})
    if len(parts) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for weights in parts for tensor in weights.values())},
            "weight_map": {name: file for file, weights in zip(names, parts, strict=True) for name in weights},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def hf_config(model: LlamaConfig, vocabulary_size: int) -> dict[str, Any]:
    """The sizes of `model` under the names of transformers' `LlamaConfig`."""
    return {
        "vocab_size": vocabulary_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_width,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_parameters": _rope_parameters(model),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": model.init_std,
        "tie_word_embeddings": False,
    }


def _described(facts: CheckpointFacts) -> dict[str, Any]:
    """config.json of a checkpoint's export."""
    return hf_config(facts.model, Vocabulary(facts.text_size, facts.codebook_size).size) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": None,
        "eos_token_id": facts.eos_id,
        "pad_token_id": None,
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[facts.precision],
    }


def _rope_parameters(model: LlamaConfig) -> dict[str, Any]:
    scaling = to_dict(model.rope_scaling) if model.rope_scaling else {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        scaling = {name: scaling[name] for name in ("rope_type", "factor")}
    return scaling | {"rope_theta": model.rope_theta}
