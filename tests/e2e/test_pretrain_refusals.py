"""What a user can get wrong in pretraining: one sentence, exit code 2, and nothing begun."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from lavit_dist.checkpoint.llama_state import FACTS, CheckpointFacts
from lavit_dist.checkpoint.official import save_visual_tokenizer
from lavit_dist.config.base import build, to_dict
from lavit_dist.config.command_line import WRONG_CONFIG, run_entry_point
from lavit_dist.config.model import LlamaConfig, VisualTokenizerConfig
from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.data.image_tokens import write_mixed_tokenizer
from lavit_dist.data.kept_manifest import keep_manifest
from lavit_dist.data.manifest import load_manifest, write_manifest
from lavit_dist.data.text_tokenizer import TextTokenizer, train_text_tokenizer
from lavit_dist.models.visual_tokenizer import VisualTokenizer
from lavit_dist.models.vocabulary import Vocabulary
from pipelines.pretrain import run

REFUSALS = {
    "an unknown key": (1, ["model.hiden_size=64"], "did you mean 'model.hidden_size'"),
    "processes that can't be shared out": (
        3,
        ["parallel.tensor_parallel_size=2"],
        "The 3 processes that were started can't be shared out",
    ),
    "ZeRO-2 with a pipeline": (
        2,
        ["parallel.pipeline_parallel_size=2", "parallel.zero_stage=2"],
        "set parallel.zero_stage to 0 or 1, or parallel.pipeline_parallel_size to 1",
    ),
    "a ZeRO stage that doesn't exist": (1, ["parallel.zero_stage=4"], "parallel.zero_stage = 4 is not legal"),
    "heads and tensor ranks": (3, ["parallel.tensor_parallel_size=3"], "model.num_attention_heads 4 can't be shared out"),
    "key-value heads and tensor ranks": (4, ["parallel.tensor_parallel_size=4"], "model.num_key_value_heads 2 can't be shared out"),
    "hidden channels and tensor ranks": (
        2,
        ["parallel.tensor_parallel_size=2", "model.ffn_hidden_size=129"],
        "model.ffn_hidden_size 129 can't be shared out",
    ),
    "vocabulary and tensor ranks": (
        5,
        [
            "parallel.tensor_parallel_size=5",
            "model.num_attention_heads=5",
            "model.num_key_value_heads=5",
            "model.hidden_size=80",
            "model.ffn_hidden_size=130",
        ],
        "can't be shared out to parallel.tensor_parallel_size 5 processes; choose a tensor_parallel_size that divides",
    ),
    "more stages than layers": (8, ["parallel.pipeline_parallel_size=8"], "is more than model.num_layers 4"),
    "rows longer than positions": (1, ["seq_len=256"], "seq_len 256 is longer than model.max_position_embeddings 128"),
    "batch and micro-batch": (1, ["micro_batch_size=3"], "global_batch_size 8 is not a multiple of micro_batch_size 3"),
    "batch and data ranks": (
        8,
        [],
        "is not a multiple of micro_batch_size 2 x 8 data-parallel processes; choose 16, a multiple of 16",
    ),
    "bf16 without master weights": (1, ["precision=bf16", "parallel.zero_stage=0"], "precision bf16 needs the fp32 master weights"),
    "an optimizer for whole matrices": (1, ["optimizer.name=muon"], "optimizer.name muon needs every matrix whole"),
    "an 8-bit optimizer": (1, ["optimizer.name=adamw8bit"], "optimizer.name = 'adamw8bit' is not legal: input should be 'adamw'"),
    "apex's optimizer without apex": (1, ["optimizer.implementation=apex"], "choose torch, or auto"),
    "Transformer Engine that isn't installed": (1, ["attention=transformer_engine"], "set attention to torch"),
    "a missing id set": (1, ["ids=nowhere"], "nowhere holds no id set"),
    "a missing id set among several": (1, ["ids=null", "sources.text.ids=nowhere"], "nowhere holds no id set"),
    "one id set and several": (1, ["sources.text.ids=nowhere"], "keep one of these settings"),
    "a missing text tokenizer": (1, ["text_tokenizer=nowhere"], "nowhere is not a tokenizer folder"),
    "a missing visual tokenizer": (1, ["visual_tokenizer=nowhere"], "nowhere"),
}


def refused(settings: dict[str, Any], folder: Path, processes: int, overrides: Sequence[str], monkeypatch: Any, capfd: Any) -> str:
    """Starts rank 0 of `processes`; returns its one sentence."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | {"total_steps": 3}))
    arguments = ["--config", str(folder / "config.yaml"), f"run_dir={folder / 'run'}", *overrides]
    with pytest.raises(SystemExit) as exit_:
        run_entry_point(PretrainConfig, run, "Pretraining.", arguments)
    assert exit_.value.code == WRONG_CONFIG
    assert not dist.is_initialized()
    said: str = capfd.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


@pytest.mark.parametrize("name", REFUSALS)
def test_refused(name: str, pretrain_settings: dict[str, Any], tmp_path: Path, monkeypatch, capfd) -> None:
    processes, overrides, sentence = REFUSALS[name]
    assert sentence in refused(pretrain_settings, tmp_path, processes, overrides, monkeypatch, capfd)
    assert not (tmp_path / "run").exists()


def test_more_rows_than_there_are(pretrain_settings, tmp_path: Path, monkeypatch, capfd) -> None:
    overrides = ["ids=null", f"sources.pairs.ids={pretrain_settings['ids']}", "sources.pairs.max_epochs=1", "total_steps=1000"]
    said = refused(pretrain_settings, tmp_path, 1, overrides, monkeypatch, capfd)
    assert "total_steps x global_batch_size asks for 8,000 rows, but " in said
    assert "with max_epochs 1); raise or leave out max_epochs" in said
    assert not (tmp_path / "run").exists()


def test_ids_of_another_text_tokenizer(pretrain_settings, tmp_path: Path, monkeypatch, capfd) -> None:
    train_text_tokenizer(["another text altogether"], 280, tmp_path / "another")
    said = refused(pretrain_settings, tmp_path, 1, [f"text_tokenizer={tmp_path}/another"], monkeypatch, capfd)
    assert "were made with the text_tokenizer" in said


def test_a_text_tokenizer_that_no_export_could_have(pretrain_settings, tmp_path: Path, monkeypatch, capfd) -> None:
    text = TextTokenizer.load(pretrain_settings["text_tokenizer"])
    taken = with_image_tokens(text, tmp_path / "taken")
    shutil.copytree(pretrain_settings["ids"], tmp_path / "ids")
    manifest = tmp_path / "ids" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(text.digest, taken.digest))
    overrides = [f"text_tokenizer={taken.folder}", f"ids={tmp_path}/ids"]
    said = refused(pretrain_settings, tmp_path, 1, overrides, monkeypatch, capfd)
    assert f"gives [IMG] the id {text.vocab_size} in place of {taken.vocab_size}" in said
    assert not (tmp_path / "run").exists()


def with_image_tokens(text: TextTokenizer, folder: Path) -> TextTokenizer:
    """A text tokenizer that has [IMG] already."""
    write_mixed_tokenizer(text.folder, folder, Vocabulary(text.vocab_size, 2))
    return TextTokenizer.load(folder)


def test_ids_of_another_visual_tokenizer(pretrain_settings, tmp_path: Path, monkeypatch, capfd) -> None:
    small = {
        "encoder": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8, "mlp_hidden": 16, "head_out": 8},
        "merger": {"layers": 1, "heads": 2, "mlp_hidden": 16},
        "codebook": {"size": 70, "dim": 4},
        "decoder": {"depth": 1, "heads": 2, "mlp_hidden": 16, "unet_dim": 8},
    }
    save_visual_tokenizer(VisualTokenizer(build(VisualTokenizerConfig, small)), tmp_path / "tokenizer")
    said = refused(pretrain_settings, tmp_path, 1, [f"visual_tokenizer={tmp_path}/tokenizer"], monkeypatch, capfd)
    assert "were made with the visual_tokenizer" in said


def test_the_other_package_named_apex(pretrain_settings, tmp_path: Path, monkeypatch, capfd) -> None:
    (tmp_path / "site" / "apex").mkdir(parents=True)
    (tmp_path / "site" / "apex" / "__init__.py").write_text("raise ImportError('a web toolkit was imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    said = refused(pretrain_settings, tmp_path, 1, [], monkeypatch, capfd)
    assert "is an unrelated web toolkit from PyPI" in said
    assert "pip uninstall apex" in said


def test_a_run_folder_of_other_settings(pretrain_settings, tmp_path: Path, monkeypatch, capfd) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(pretrain_settings | {"seq_len": 64}))
    assert "belongs to a run with" in refused(pretrain_settings, tmp_path, 1, [], monkeypatch, capfd)


def test_a_checkpoint_that_latest_names_but_is_gone(pretrain_settings, tmp_path: Path, monkeypatch, capfd) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-00000002")
    assert "step-00000002, which is missing" in refused(pretrain_settings, tmp_path, 1, [], monkeypatch, capfd)


def test_ids_that_changed_since_the_checkpoint(pretrain_settings, tmp_path: Path, monkeypatch, capfd) -> None:
    shutil.copytree(pretrain_settings["ids"], tmp_path / "ids")
    manifest = load_manifest(tmp_path / "ids")
    keep_manifest(tmp_path / "run" / "data", manifest, {})
    data = {"sources": {"ids": {"fingerprint": manifest.fingerprint}}}
    write_checkpoint(tmp_path / "run", processes=1, data=data, codebook_size=70)
    write_manifest(tmp_path / "ids", manifest.shards[:1])
    said = refused(pretrain_settings, tmp_path, 1, [f"ids={tmp_path}/ids"], monkeypatch, capfd)
    assert f"was trained on the id set {manifest.fingerprint[:16]}" in said
    assert "of 2 shards there are 1 missing (shard-00001.arrow); give the set it was trained on" in said


def test_ids_with_a_shard_missing(pretrain_settings, tmp_path: Path, monkeypatch, capfd) -> None:
    shutil.copytree(pretrain_settings["ids"], tmp_path / "ids")
    (tmp_path / "ids" / "shard-00001.arrow").unlink()
    said = refused(pretrain_settings, tmp_path, 1, [f"ids={tmp_path}/ids"], monkeypatch, capfd)
    assert "lacks 1 of its 2 shards: shard-00001.arrow" in said
    assert not (tmp_path / "run").exists()


def write_checkpoint(run_dir: Path, *, processes: int, data: dict[str, Any], codebook_size: int = 1) -> None:
    """What is read of a checkpoint before a run resumes from it."""
    step = run_dir / "checkpoints" / "step-00000002"
    step.mkdir(parents=True)
    (step.parent / "latest").write_text(step.name)
    (step / "manifest.json").write_text(json.dumps({"step": 2, "ranks": processes, "score": None, "files": {}}))
    layout = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": processes, "zero_stage": 1}
    sizes = {"text_size": 1, "codebook_size": codebook_size, "eos_id": 0}
    facts = CheckpointFacts(
        step=2, model=LlamaConfig(), precision="fp32", visual_tokenizer_digest="", layout=layout, data=data, **sizes
    )
    (step / FACTS).write_text(json.dumps(to_dict(facts)))
