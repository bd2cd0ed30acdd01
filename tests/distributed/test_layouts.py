"""The parallel layout decides where numbers are computed, never which."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from lavit_dist.config.base import build, save_config
from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.data.micro_batch import PADDING_DOCUMENT
from lavit_dist.models.vocabulary import Vocabulary
from pipelines.pretrain import open_batches

STEPS = 20
FIRST_STEPS = 5
"""Before rounding has grown: Adam's first updates have the size of the learning rate, however small a gradient is."""
LAYOUTS = {  # tensor, pipeline, data, ZeRO stage, precision
    "one process": (1, 1, 1, 1, "fp32"),
    "tensor without ZeRO": (2, 1, 1, 0, "fp32"),
    "pipeline without ZeRO": (1, 2, 1, 0, "fp32"),
    "tensor x pipeline": (2, 2, 1, 1, "fp32"),
    "data, ZeRO-2": (1, 1, 2, 2, "fp32"),
    "tensor x data, ZeRO-3": (2, 1, 2, 3, "fp32"),
    "pipeline in bf16": (1, 2, 1, 1, "bf16"),
}
EXACT = [name for name, layout in LAYOUTS.items() if layout[-1] == "fp32"]


@dataclass(frozen=True)
class Trained:
    """What a layout's run left behind."""

    out: Path
    config: PretrainConfig
    straight: list[dict[str, float]]
    resumed: list[dict[str, float]]


@pytest.fixture(scope="module")
def train_on(run_ranks: Callable[..., None], pretrain_settings: dict[str, Any], tmp_path_factory) -> Callable[[str], Trained]:
    """`train_on(name)`: the run of a layout, made once."""
    done: dict[str, Trained] = {}

    def train(name: str) -> Trained:
        if name not in done:
            tensor, pipeline, data, zero, precision = LAYOUTS[name]
            out = tmp_path_factory.mktemp("layout")
            parallel = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline, "zero_stage": zero}
            changes = {"run_dir": str(out), "total_steps": STEPS, "parallel": parallel, "precision": precision}
            config = build(PretrainConfig, pretrain_settings | changes)
            save_config(config, out / "config.yaml")
            program = Path(__file__).with_name("train_on_layout.py")
            run_ranks(program, tensor * pipeline * data, str(out / "config.yaml"), str(out))
            metrics = json.loads((out / "metrics.json").read_text())
            done[name] = Trained(out, config, metrics["straight"], metrics["resumed"])
        return done[name]

    return train


@pytest.mark.parametrize("name", EXACT[1:])
def test_losses_and_gradient_norms_are_those_of_one_process(name: str, train_on: Callable[[str], Trained]) -> None:
    one, many = train_on("one process"), train_on(name)
    assert len(one.straight) == STEPS
    assert one.straight[-1]["loss"] < 0.95 * one.straight[0]["loss"]
    assert any(step["grad_norm"] > one.config.optimizer.gradient_clipping for step in one.straight)
    for step, (expected, found) in enumerate(zip(one.straight, many.straight, strict=True)):
        loss_names = set(expected) - {"grad_norm"}
        assert {name: found[name] for name in loss_names} == pytest.approx(
            {name: expected[name] for name in loss_names}, rel=1e-5
        ), step
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5 if step < FIRST_STEPS else 1e-2), step


def test_bf16_follows_fp32_at_its_own_accuracy(train_on: Callable[[str], Trained]) -> None:
    exact, rounded = train_on("one process"), train_on("pipeline in bf16")
    for step, (expected, found) in enumerate(zip(exact.straight, rounded.straight, strict=True)):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-2), step
        if step < FIRST_STEPS:
            assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2), step
    assert rounded.straight != exact.straight


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_resumed_run_repeats_the_straight_one_bit_for_bit(name: str, train_on: Callable[[str], Trained]) -> None:
    trained = train_on(name)
    assert trained.resumed
    assert trained.resumed == trained.straight[-len(trained.resumed) :]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_exported_model_has_the_logits_of_the_parallel_one(name: str, train_on: Callable[[str], Trained]) -> None:
    trained = train_on(name)
    parallel = torch.load(trained.out / "logits.pt").transpose(0, 1)
    batches = open_batches(trained.config)
    _, _, data_size, _, precision = LAYOUTS[name]
    batch = batches.micro_batches(STEPS, 0, data_size, trained.config.micro_batch_size)[0]
    model = LlamaForCausalLM.from_pretrained(trained.out / "model")
    tolerance = 1e-5 if precision == "fp32" else 1e-1
    compared = 0
    for row in range(len(batch.tokens)):
        for document in batch.document_ids[row].unique().tolist():
            where = batch.document_ids[row] == document
            if document != PADDING_DOCUMENT:
                with torch.no_grad():
                    alone = model(batch.tokens[row][where][None]).logits[0]
                torch.testing.assert_close(parallel[row][where], alone, rtol=tolerance, atol=tolerance)
                compared += 1
    assert compared > len(batch.tokens)  # documents were packed, and each equals itself alone


def test_the_export_says_how_its_ids_are_read(train_on: Callable[[str], Trained]) -> None:
    trained = train_on("tensor x pipeline")
    rows = open_batches(trained.config).rows
    meaning = json.loads((trained.out / "model" / "lavit.json").read_text())
    assert Vocabulary(meaning["text_size"], meaning["codebook_size"]) == rows.vocabulary
    assert meaning["eos_id"] == rows.eos_id
    assert meaning["visual_tokenizer_digest"] == rows.manifest.encoding.visual_tokenizer
    assert (trained.out / "model" / "tokenizer.json").exists()
