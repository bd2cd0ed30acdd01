"""Starting from a Hugging Face LLaMA: nothing of it is changed on the way in and out, and what is frozen stays, on every layout."""

import json
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from lavit_dist.checkpoint.llama_folder import LlamaFolder
from lavit_dist.config.base import build, save_config
from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.models.llama import EMBEDDING, FINAL_NORM, HEAD

PROGRAM = Path(__file__).with_name("train_from_llama.py")
STEPS, LEARNING_RATE, CODES = 2, 1e-3, 70
FROZEN = ("model.layers.*.self_attn.*", "model.embed_tokens.weight")
SCALES = {"new_rows": 4.0, "embeddings": 0.5, "body": 1.0}
LAYOUTS = {  # tensor, pipeline, data, ZeRO stage, precision
    "one process": (1, 1, 1, 1, "fp32"),
    "tensor x pipeline": (2, 2, 1, 1, "fp32"),
    "pipeline without ZeRO": (1, 2, 1, 0, "fp32"),
    "tensor, ZeRO-2": (2, 1, 1, 2, "fp32"),
    "data, ZeRO-3": (1, 1, 2, 3, "fp32"),
    "pipeline in bf16": (1, 2, 1, 1, "bf16"),
}


@pytest.fixture(scope="module")
def start_from(
    run_ranks: Callable[..., None], pretrain_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`start_from(llama, layout, **changes)`: the OUT of the program."""

    def start(llama: Path, name: str, **changes: Any) -> Path:
        tensor, pipeline, data, zero, precision = LAYOUTS[name]
        out = tmp_path_factory.mktemp("from_llama")
        optimizer = {"learning_rate": LEARNING_RATE, "weight_decay": 0.0, "schedule": "constant", "warmup_steps": 0}
        settings = pretrain_settings | {
            "run_dir": str(out),
            "init_from": str(llama),
            "total_steps": STEPS,
            "parallel": {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline, "zero_stage": zero},
            "precision": precision,
            "optimizer": optimizer,
            "parameters": {"freeze": FROZEN, "learning_rate_scale": SCALES},
        }
        config = build(PretrainConfig, settings | changes)
        save_config(config, out / "config.yaml")
        run_ranks(PROGRAM, tensor * pipeline * data, str(out / "config.yaml"), str(out), timeout=220)
        return out

    return start


@pytest.fixture(scope="module")
def export(pretrain_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], Path]:
    """`export(dtype)`: a LLaMA of the run's sizes with visual rows, as this project exports one."""
    from lavit_dist.data.text_tokenizer import TextTokenizer

    def make(dtype: torch.dtype) -> Path:
        folder, sizes = tmp_path_factory.mktemp("llama"), pretrain_settings["model"]
        text = TextTokenizer.load(pretrain_settings["text_tokenizer"])
        config = LlamaConfig(
            vocab_size=text.vocab_size + CODES + 2,
            hidden_size=sizes["hidden_size"],
            intermediate_size=sizes["ffn_hidden_size"],
            num_hidden_layers=sizes["num_layers"],
            num_attention_heads=sizes["num_attention_heads"],
            num_key_value_heads=sizes["num_key_value_heads"],
            rms_norm_eps=1e-5,
            max_position_embeddings=sizes["max_position_embeddings"],
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
        (folder / "lavit.json").write_text(json.dumps({"text_size": text.vocab_size, "codebook_size": CODES}))
        return folder

    return make


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_comes_out_as_it_went_in_and_what_is_frozen_stays(name: str, start_from, export) -> None:
    precision = LAYOUTS[name][-1]
    source = export({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    out = start_from(source, name)
    given, before, after = (load_file(folder / "model.safetensors") for folder in (source, out / "before", out / "after"))
    assert LlamaFolder(out / "before").config == LlamaFolder(source).config
    assert before.keys() == given.keys()
    for tensor_name, tensor in given.items():
        assert before[tensor_name].dtype == tensor.dtype
        assert torch.equal(before[tensor_name], tensor), tensor_name
    text_size = len(given[EMBEDDING]) - CODES - 2
    parts = {
        f"{table} {part}": (table, rows)
        for table in (EMBEDDING, HEAD)
        for part, rows in (("text", slice(text_size)), ("new", slice(text_size, None)))
    }
    parts |= {tensor_name: (tensor_name, slice(None)) for tensor_name in given.keys() - {EMBEDDING, HEAD}}
    for label, (table, rows) in parts.items():
        change = (after[table][rows] - before[table][rows]).abs().max().item()
        if label == f"{EMBEDDING} text" or any(fnmatch(label, pattern) for pattern in FROZEN):
            assert change == 0, label
        else:
            kind = "new_rows" if label.endswith(" new") else "embeddings" if label.endswith(" text") else "body"
            largest = STEPS * LEARNING_RATE * SCALES[kind]  # Adam's first updates have the size of the learning rate
            rounding = (
                torch.finfo(after[table].dtype).eps / 2 * after[table][rows].abs().max().item()
            )  # half a unit in the last place
            assert largest / 4 - rounding < change < largest * 1.05 + rounding, (label, change, largest, rounding)
            assert change > 0, label


@pytest.mark.parametrize("name", ["tensor x pipeline", "data, ZeRO-3", "pipeline in bf16"])
def test_a_checkpoint_brings_every_weight_without_the_folder(name: str, start_from, export) -> None:
    out = start_from(export({"fp32": torch.float32, "bf16": torch.bfloat16}[LAYOUTS[name][-1]]), name)
    after, resumed = (load_file(out / folder / "model.safetensors") for folder in ("after", "resumed"))
    assert after.keys() == resumed.keys()
    for tensor_name, tensor in after.items():
        assert torch.equal(resumed[tensor_name], tensor), tensor_name


def test_losses_do_not_depend_on_the_layout(start_from, export) -> None:
    source = export(torch.float32)
    losses = {}
    for name in ("one process", "tensor x pipeline", "data, ZeRO-3"):
        metrics = json.loads((start_from(source, name) / "metrics.json").read_text())
        losses[name] = [(step["loss"], step["grad_norm"], step["learning_rate"]) for step in metrics]
    for found in losses.values():
        assert found == [pytest.approx(step, rel=1e-5) for step in losses["one process"]]


def test_a_text_model_gets_new_rows_that_no_layout_changes(start_from, export) -> None:
    text_model = export(torch.float32)
    (text_model / "lavit.json").unlink()  # what was the first codes' rows is padding now
    one, four = (
        load_file(start_from(text_model, name) / "before" / "model.safetensors") for name in ("one process", "tensor x pipeline")
    )
    given = load_file(text_model / "model.safetensors")
    text_size = len(given[EMBEDDING]) - CODES - 2
    for table in (EMBEDDING, HEAD):
        assert torch.equal(one[table], four[table])
        assert torch.equal(one[table][:text_size], given[table][:text_size])
        assert not torch.equal(one[table][text_size:], given[table][text_size:])
        assert one[table][text_size:].std() == pytest.approx(float(given[table].std()), rel=0.2)
    assert torch.equal(one[FINAL_NORM], given[FINAL_NORM])


def test_a_stage_with_nothing_to_train_is_refused(start_from, export) -> None:
    freeze = ["model.layers.*", "model.embed_tokens.*"]
    out = start_from(export(torch.float32), "pipeline without ZeRO", parameters={"freeze": freeze})
    assert "leaves pipeline stage 0 of 2 without anything to train" in (out / "refused.txt").read_text()
    out = start_from(export(torch.float32), "one process", parameters={"freeze": freeze})
    assert (out / "after").exists()
