"""The parallel layout decides where numbers are computed, never which."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from lavit_dist.config.base import build, load_config, save_config, to_dict
from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.data.micro_batch import PADDING_DOCUMENT
from lavit_dist.models.vocabulary import Vocabulary
from pipelines.pretrain import open_batches
from tests.distributed.layout_report import Difference, render
from tests.distributed.row_variants import OneSidedSupervision
from tests.distributed.settings import ONE_PROCESS, ONE_SIDED, ONE_SIDED_PROCESS, PACKED, Setting, settings_of

ALL_STEPS, SELECTION_STEPS = 20, 10
"""Steps of a run with and without --all-layouts."""
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
MODEL = {
    "hidden_size": 64,
    "num_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "ffn_hidden_size": 128,
    "max_position_embeddings": 128,
}
"""Small, and divisible by four tensor ranks and four stages."""
OPTIMIZER = {"learning_rate": 5e-4, "warmup_steps": 3, "gradient_clipping": 0.65}
"""At larger learning rates rounding grows from step to step (docs/layouts.md); some steps are clipped, others are not."""
SECONDS_PER_SETTING = 60
PER_LAUNCH = 16
"""Settings in one launch: communicators of finished settings keep their threads, and slow down those that follow."""
RANKS = [pytest.param(size, marks=pytest.mark.xdist_group(f"{size} ranks")) for size in (1, 2, 4, 8)]
Steps = list[dict[str, float]]


@dataclass(frozen=True)
class Trained:
    """What a setting's run left behind."""

    setting: Setting
    folder: Path
    straight: Steps
    resumed: Steps


@pytest.fixture(scope="module")
def config(pretrain_settings: dict[str, Any], layouts_folder: Path, all_layouts: bool) -> PretrainConfig:
    steps = ALL_STEPS if all_layouts else SELECTION_STEPS
    changes = {"run_dir": str(layouts_folder), "total_steps": steps, "model": MODEL, "optimizer": OPTIMIZER}
    config = build(PretrainConfig, pretrain_settings | changes)
    saved = layouts_folder / "config.yaml"
    if saved.exists():
        then, now = (to_dict(value) for value in (load_config(PretrainConfig, saved), config))
        different = {name for name in now if now[name] != then[name]} - {"run_dir", "ids", "text_tokenizer"}
        assert not different, f"{layouts_folder} has runs with other settings: {sorted(different)}"
    return config


@pytest.fixture(scope="module")
def train(config: PretrainConfig, run_ranks: Callable[..., None]) -> Callable[[list[Setting]], list[Trained]]:
    """`train(settings)`: their runs, all of one number of ranks, `PER_LAUNCH` of those that aren't there yet in one launch."""

    def launch(settings: list[Setting]) -> list[Trained]:
        out, (world_size,) = Path(config.run_dir), {setting.world_size for setting in settings}
        save_config(config, out / "config.yaml")
        listed = out / f"settings-{world_size}.json"
        program = Path(__file__).with_name("train_on_layouts.py")
        arguments = [str(out / "config.yaml"), str(listed), str(out)]
        ahead = [setting for setting in settings if not (out / setting.name / "metrics.json").exists()]
        for first in range(0, len(ahead), PER_LAUNCH):
            now = ahead[first : first + PER_LAUNCH]
            listed.write_text(json.dumps([dataclasses.asdict(setting) for setting in now]))
            run_ranks(program, world_size, *arguments, timeout=SECONDS_PER_SETTING * (1 + len(now)))
        metrics = [json.loads((out / setting.name / "metrics.json").read_text()) for setting in settings]
        return [Trained(setting, out / setting.name, **steps) for setting, steps in zip(settings, metrics, strict=True)]

    return launch


@pytest.fixture(scope="module")
def one_process(train: Callable[[list[Setting]], list[Trained]]) -> dict[str, Steps]:
    """The steps that all others are compared with: packed, and with one-sided supervision."""
    packed, one_sided = train([ONE_PROCESS, ONE_SIDED_PROCESS])
    return {PACKED: packed.straight, ONE_SIDED: one_sided.straight}


@pytest.fixture(scope="module", params=RANKS)
def trained(request: pytest.FixtureRequest, train: Callable[[list[Setting]], list[Trained]], all_layouts: bool) -> list[Trained]:
    """The runs of one number of ranks."""
    settings = settings_of(request.param, everything=all_layouts)
    if not settings:
        pytest.skip("runs with --all-layouts")
    return train(settings)


@pytest.fixture(scope="module")
def differences(repo_root: Path) -> Iterator[dict[Setting, Difference]]:
    """Collects what the settings differ by; when all were compared, docs/layouts.md is written."""
    found: dict[Setting, Difference] = {}
    yield found
    everything = [setting for size in (1, 2, 4, 8) for setting in settings_of(size, everything=True)]
    if set(everything) <= set(found):
        notes = Path(__file__).with_name("layout_notes.md").read_text()
        (repo_root / "docs" / "layouts.md").write_text(render(found, notes))


def test_losses_and_gradient_norms_are_those_of_one_process(
    trained: list[Trained], one_process: dict[str, Steps], differences: dict[Setting, Difference], config: PretrainConfig
) -> None:
    for run in trained:
        expected = one_process[ONE_SIDED if run.setting.rows == ONE_SIDED else PACKED]
        assert len(run.straight) == len(expected) == config.total_steps
        losses, norms = (
            [_relative(there[name], here[name]) for there, here in zip(run.straight, expected, strict=True)]
            for name in ("loss", "grad_norm")
        )
        differences[run.setting] = Difference(max(losses), max(norms))
    far = {
        setting.name: difference for setting, difference in differences.items() if max(difference) > TOLERANCE[setting.precision]
    }
    assert not far


def test_what_else_is_reported_of_a_step_is_that_of_one_process(trained: list[Trained], one_process: dict[str, Steps]) -> None:
    for run in trained:
        expected = one_process[ONE_SIDED if run.setting.rows == ONE_SIDED else PACKED]
        for name in ("text_loss", "image_loss", "learning_rate", "tokens"):
            found = [step[name] for step in run.straight]
            assert found == pytest.approx([step[name] for step in expected], rel=TOLERANCE[run.setting.precision]), run.setting.name


def test_the_comparison_can_fail(one_process: dict[str, Steps]) -> None:
    """The model learns, clipping sets in and out, supervision matters, and other arithmetic is seen."""
    packed, one_sided = one_process[PACKED], one_process[ONE_SIDED]
    assert packed[-1]["loss"] < 0.98 * packed[0]["loss"]
    clipped = [step["grad_norm"] > OPTIMIZER["gradient_clipping"] for step in packed]
    assert any(clipped) and not all(clipped)
    assert _relative(one_sided[0]["grad_norm"], packed[0]["grad_norm"]) > 1e-2


def test_half_of_the_data_ranks_get_a_tenth_of_the_labels(config: PretrainConfig) -> None:
    batches = OneSidedSupervision(open_batches(config))
    for step in range(config.total_steps):
        many, few = (
            sum((batch.loss_weight > 0).sum().item() for batch in batches.micro_batches(step, rank, 2, config.micro_batch_size))
            for rank in range(2)
        )
        assert 8 < many / few < 15


def test_bf16_is_other_arithmetic(trained: list[Trained], one_process: dict[str, Steps]) -> None:
    for run in trained:
        if run.setting.precision == "bf16":
            assert max(_relative(a["loss"], b["loss"]) for a, b in zip(run.straight, one_process[PACKED], strict=True)) > 1e-6


def test_a_resumed_run_repeats_the_straight_one_bit_for_bit(trained: list[Trained]) -> None:
    for run in trained:
        if run.setting.resumes:
            assert run.resumed, run.setting.name
            assert run.resumed == run.straight[-len(run.resumed) :], run.setting.name


def test_the_exported_model_has_the_logits_of_the_parallel_one(trained: list[Trained], config: PretrainConfig) -> None:
    batches = open_batches(config)
    for run in trained:
        if not run.setting.resumes or run.setting.rows != PACKED:
            continue
        parallel = torch.load(run.folder / "logits.pt").transpose(0, 1)
        batch = batches.micro_batches(config.total_steps, 0, run.setting.data, config.micro_batch_size)[0]
        model = LlamaForCausalLM.from_pretrained(run.folder / "model")
        tolerance = 1e-5 if run.setting.precision == "fp32" else 1e-1
        compared = 0
        for row in range(len(batch.tokens)):
            for document in batch.document_ids[row].unique().tolist():
                where = batch.document_ids[row] == document
                if document != PADDING_DOCUMENT:
                    with torch.no_grad():
                        alone = model(batch.tokens[row][where][None]).logits[0]
                    torch.testing.assert_close(parallel[row][where].to(alone.dtype), alone, rtol=tolerance, atol=tolerance)
                    compared += 1
        assert compared > len(batch.tokens)  # documents were packed, and each equals itself alone


def test_the_export_says_how_its_ids_are_read(trained: list[Trained], config: PretrainConfig) -> None:
    rows = open_batches(config).rows
    for run in trained:
        if run.setting.resumes:
            meaning = json.loads((run.folder / "model" / "lavit.json").read_text())
            assert Vocabulary(meaning["text_size"], meaning["codebook_size"]) == rows.vocabulary
            assert meaning["eos_id"] == rows.eos_id
            assert meaning["visual_tokenizer_digest"] == rows.encoding.visual_tokenizer
            assert (run.folder / "model" / "tokenizer.json").exists()


def _relative(found: float, expected: float) -> float:
    return abs(found / expected - 1)
