"""The export: files as Hugging Face wants them, from checkpoint files alone. (Logits are compared in tests/distributed.)"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from lavit_dist.checkpoint import hf
from lavit_dist.checkpoint.llama_state import FACTS, CheckpointFacts
from lavit_dist.checkpoint.snapshot import HostCopies, Snapshot, write_snapshot
from lavit_dist.checkpoint.weight_parts import INDEX, WEIGHT, Part, index_of
from lavit_dist.config.base import to_dict
from lavit_dist.config.model import LlamaConfig
from lavit_dist.data.text_tokenizer import TextTokenizer, train_text_tokenizer
from lavit_dist.errors import UserError
from lavit_dist.models.llama import EMBEDDING, FINAL_NORM, HEAD, block_name, block_shapes, initial_weight
from lavit_dist.models.vocabulary import Vocabulary
from lavit_dist.parallel.llama_shards import cut_block, cut_table

MODEL = LlamaConfig(
    hidden_size=32, num_layers=2, num_attention_heads=4, num_key_value_heads=2, ffn_hidden_size=48, max_position_embeddings=64
)
VOCABULARY = Vocabulary(text_size=258, codebook_size=70)
TENSOR_RANKS = 2


def whole_model() -> dict[str, torch.Tensor]:
    shapes = {EMBEDDING: (VOCABULARY.size, 32), FINAL_NORM: (32,), HEAD: (VOCABULARY.size, 32)}
    for layer in range(MODEL.num_layers):
        shapes |= {block_name(layer, name): shape for name, shape in block_shapes(MODEL).items()}
    return {name: initial_weight(MODEL, name, shape, seed=1) for name, shape in shapes.items()}


def table_shares(whole: torch.Tensor, rank: int) -> dict[str, torch.Tensor]:
    """A rank's rows of each table."""
    rows = whole.split([table.size for table in VOCABULARY.tables])
    return {table.name: cut_table(part, table, rank, TENSOR_RANKS) for table, part in zip(VOCABULARY.tables, rows, strict=True)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of a run with two tensor ranks."""
    whole, folder = whole_model(), tmp_path / "step-00000001"
    every, files = [], {}
    for rank in range(TENSOR_RANKS):
        layers = [table_shares(whole[EMBEDDING], rank)]
        for index in range(MODEL.num_layers):
            prefix = block_name(index)
            block = {name.removeprefix(prefix): tensor for name, tensor in whole.items() if name.startswith(prefix)}
            layers.append({f"layer.{name}": tensor for name, tensor in cut_block(block, MODEL, rank, TENSOR_RANKS).items()})
        head = {f"projection.{name}": share for name, share in table_shares(whole[HEAD], rank).items()}
        layers.append({"norm.weight": whole[FINAL_NORM], **head})
        named = {f"{index}.{name}": tensor for index, weights in enumerate(layers) for name, tensor in weights.items()}
        file = f"part-{rank:05d}.safetensors"
        of_rank = [
            (Part(name, WEIGHT, tuple(each.shape), rank, 0, each.numel(), file), each.flatten()) for name, each in named.items()
        ]
        files[f"weights/{file}"] = {part.key: tensor for part, tensor in of_rank}
        every += [part for part, _ in of_rank]
    layout = {"tensor_parallel_size": TENSOR_RANKS, "pipeline_parallel_size": 2, "data_parallel_size": 1, "zero_stage": 1}
    facts = CheckpointFacts(
        step=1,
        model=MODEL,
        precision="fp32",
        text_size=VOCABULARY.text_size,
        codebook_size=VOCABULARY.codebook_size,
        eos_id=3,
        visual_tokenizer_digest="a digest",
        layout=layout,
        data={},
    )
    objects = {f"weights/{INDEX}": index_of(TENSOR_RANKS, every), FACTS: to_dict(facts)}
    write_snapshot(folder, HostCopies().take(Snapshot(files, objects)))
    return folder


@pytest.fixture
def text_tokenizer(tmp_path: Path) -> Path:
    train_text_tokenizer(["a red circle"], 280, tmp_path / "text_tokenizer")
    return tmp_path / "text_tokenizer"


def test_transformers_reads_the_folder(checkpoint: Path, text_tokenizer: Path, tmp_path: Path) -> None:
    hf.export_hf(checkpoint, tmp_path / "model", text_tokenizer)
    model, loading = LlamaForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(loading.values())
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        name: tuple(tensor.shape) for name, tensor in whole_model().items()
    }
    assert all(torch.equal(tensor, whole_model()[name]) for name, tensor in model.state_dict().items())
    assert model.dtype == torch.float32
    assert model.config.rope_parameters["rope_theta"] == MODEL.rope_theta
    assert not model.config.tie_word_embeddings
    ids = AutoTokenizer.from_pretrained(tmp_path / "model")("a[IMG]<img_69>[/IMG]").input_ids
    assert ids == [*TextTokenizer.load(text_tokenizer).encode("a"), 258, 260 + 69, 259]
    assert TextTokenizer.load(tmp_path / "model").digest == TextTokenizer.load(text_tokenizer).digest
    assert json.loads((tmp_path / "model" / "lavit.json").read_text()) == {
        "text_size": 258,
        "codebook_size": 70,
        "eos_id": 3,
        "visual_tokenizer_digest": "a digest",
    }


def test_a_large_model_is_cut_into_several_files(
    checkpoint: Path, text_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "MAX_FILE_BYTES", 20_000)
    hf.export_hf(checkpoint, tmp_path / "model", text_tokenizer)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: path.name for path in files for name in load_file(path)}
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(tensor, whole_model()[name]) for name, tensor in model.state_dict().items())


def test_a_missing_file_is_named(checkpoint: Path, text_tokenizer: Path, tmp_path: Path) -> None:
    (checkpoint / "weights/part-00001.safetensors").unlink()
    with pytest.raises(UserError, match=r"part-00001\.safetensors is missing"):
        hf.export_hf(checkpoint, tmp_path / "model", text_tokenizer)


def test_a_folder_that_is_no_checkpoint_is_refused(text_tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a checkpoint of the language model"):
        hf.export_hf(tmp_path, tmp_path / "model", text_tokenizer)
