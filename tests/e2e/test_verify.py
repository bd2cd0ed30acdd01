"""`launcher/verify.py`: a table of differences, and the exit code that tells a script."""

import dataclasses
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lavit_dist.checkpoint.llama_folder import LlamaFolder
from lavit_dist.errors import UserError
from lavit_dist.evaluation import llama_check
from lavit_dist.parallel.topology import Layout
from pipelines import verify


def run(repo_root, *arguments):
    command = [sys.executable, "launcher/verify.py", *map(str, arguments)]
    return subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False)


def test_the_reference_is_reproduced(repo_root, reference):
    result = run(repo_root, "reference", reference)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for name in ("encoder_features", "code_ids_plus_32002", "decoder_highres_pooled", "tokenizer_decoder.bin"):
        assert any(line.split()[:1] == [name] and line.split()[-1] == "ok" for line in lines), name
    assert "FAIL" not in result.stdout


def test_an_altered_folder_ends_with_code_1(repo_root, reference, tmp_path):
    shutil.copytree(reference, tmp_path / "altered", copy_function=shutil.copyfile)
    (tmp_path / "altered" / "visual_tokenizer").chmod(0o755)
    path = tmp_path / "altered" / "visual_tokenizer" / "tokenizer_decoder.bin"
    torch.save(torch.load(path, weights_only=True) | {"surplus": torch.zeros(1)}, path)
    result = run(repo_root, "reference", tmp_path / "altered")
    assert result.returncode == 1, result.stderr
    assert "extra keys surplus" in " ".join(result.stdout.split())
    assert result.stderr == ""


def test_another_folder_ends_with_code_2(repo_root, tmp_path):
    result = run(repo_root, "reference", tmp_path)
    assert result.returncode == 2
    assert "is no folder of reference vectors" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["a file", "nowhere"])
def test_what_is_no_folder_is_refused(tmp_path, name):
    (tmp_path / "a file").touch()
    with pytest.raises(UserError, match="no folder of reference vectors"):
        verify.reference(str(tmp_path / name))


def test_a_llama_is_compared_on_processes_that_it_starts_itself(repo_root, tmp_path):
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    result = run(repo_root, "hf", tmp_path, "--tensor", "2")
    assert result.returncode == 0, result.stderr
    assert "tensor 2 x pipeline 1: equal to LlamaForCausalLM" in " ".join(result.stdout.split())
    assert result.stdout.count("ok") > 2


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (("--tensor", "3"), "can't be shared out to parallel.tensor_parallel_size 3"),
        (("--pipeline", "9"), "more than model.num_layers 2"),
    ],
)
def test_a_llama_that_cannot_be_cut_so_ends_with_code_2(repo_root, tmp_path, layout, message):
    config = LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    result = run(repo_root, "hf", tmp_path, *layout)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.fixture
def llama(tmp_path):
    """A small LLaMA of 60 ids, its stand-in vocabulary, and documents of it."""
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    vocabulary = llama_check.llama_vocabulary(LlamaFolder(tmp_path))
    return tmp_path, vocabulary, llama_check.random_documents(vocabulary, 60, 64)


def test_a_process_that_fails_is_named_with_what_it_said(llama):
    folder, vocabulary, batch = llama
    wrong = dataclasses.replace(batch, position_ids=batch.position_ids[:, :3])
    with pytest.raises(UserError, match=r"^Rank [01] of the comparison failed: \w+Error: .*$"):
        llama_check.logits_in_layout(folder, Layout(2, 1, 1), vocabulary, wrong)


def test_fewer_gpus_than_processes_are_refused(llama, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="tensor 2 x pipeline 2 takes 4 GPUs, one for each process, but there are 1;"):
        llama_check.logits_in_layout(llama[0], Layout(2, 2, 1), *llama[1:])


def test_a_folder_without_a_llama_ends_with_code_2(repo_root, tmp_path):
    result = run(repo_root, "hf", tmp_path)
    assert result.returncode == 2
    assert "it has no config.json" in result.stderr
    assert "Traceback" not in result.stderr
