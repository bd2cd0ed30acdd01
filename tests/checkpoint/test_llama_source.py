"""Initial weights from a folder: text rows as they are, visual rows read from an export of ours or made anew."""

import dataclasses
import json
import logging

import pytest
import torch

from lavit_dist.checkpoint.llama_folder import LlamaFolder
from lavit_dist.checkpoint.llama_source import LlamaSource, llama_source
from lavit_dist.checkpoint.official import save_visual_tokenizer
from lavit_dist.config.base import build, to_dict
from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.errors import UserError
from lavit_dist.models.llama import EMBEDDING, HEAD, NEW_EMBEDDING, NEW_HEAD, block_name
from lavit_dist.models.visual_tokenizer import VisualTokenizer
from lavit_dist.models.vocabulary import Vocabulary
from tests.small_tokenizer import SMALL

TEXT, CODES, WIDTH = 50, 8, 32
VOCABULARY = Vocabulary(TEXT, CODES)


def source(path, vocabulary=VOCABULARY, **settings):
    folder = LlamaFolder(path)
    return LlamaSource(folder, folder.config, vocabulary, **settings)


def test_text_rows_and_blocks_are_the_folders_in_fp32(save_llama, tmp_path):
    weights = save_llama(tmp_path, vocab_size=TEXT, dtype=torch.bfloat16).state_dict()
    read = source(tmp_path)
    norm = block_name(1, "mlp.down_proj.weight")
    for name in (EMBEDDING, HEAD, norm):
        tensor = read(name, tuple(weights[name].shape))
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, weights[name].float())


def test_rows_beyond_the_text_tokenizer_are_cut_with_a_warning(save_llama, tmp_path, caplog):
    weights = save_llama(tmp_path, vocab_size=64).state_dict()
    with caplog.at_level(logging.WARNING):
        read = source(tmp_path)
    assert "64 rows, the text tokenizer 50 ids" in caplog.text
    assert torch.equal(read(HEAD, (TEXT, WIDTH)), weights[HEAD][:TEXT])


def test_a_table_shorter_than_the_text_tokenizer_is_refused(save_llama, tmp_path):
    save_llama(tmp_path, vocab_size=40)
    with pytest.raises(UserError, match="has 40 rows, fewer than the 50 ids"):
        source(tmp_path)


def test_an_export_of_ours_brings_its_visual_rows(save_llama, tmp_path, caplog):
    weights = save_llama(tmp_path, vocab_size=VOCABULARY.size).state_dict()
    (tmp_path / "lavit.json").write_text(json.dumps({"text_size": TEXT, "codebook_size": CODES}))
    read = source(tmp_path)
    assert not caplog.records
    assert torch.equal(read(EMBEDDING, (TEXT, WIDTH)), weights[EMBEDDING][:TEXT])
    assert torch.equal(read(NEW_EMBEDDING, (CODES + 2, WIDTH)), weights[EMBEDDING][TEXT:])
    assert torch.equal(read(NEW_HEAD, (CODES + 2, WIDTH)), weights[HEAD][TEXT:])
    with pytest.raises(UserError, match="50 text ids and 8 codes in 60 rows, but this run has 50 and 9"):
        source(tmp_path, Vocabulary(TEXT, CODES + 1))


def test_new_rows_beside_an_export_are_ignored_with_a_warning(save_llama, tmp_path, caplog):
    save_llama(tmp_path, vocab_size=VOCABULARY.size)
    (tmp_path / "lavit.json").write_text(json.dumps({"text_size": TEXT, "codebook_size": CODES}))
    paths = {"run_dir": "run", "ids": "ids", "text_tokenizer": "text", "init_from": str(tmp_path)}
    counts = {"total_steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "seq_len": 64}
    config = build(PretrainConfig, paths | counts | {"model": to_dict(LlamaFolder(tmp_path).config), "new_rows": "normal"})
    with caplog.at_level(logging.WARNING):
        llama_source(config, VOCABULARY, "digest")
    assert "new_rows normal is ignored" in caplog.text
    caplog.clear()
    llama_source(dataclasses.replace(config, new_rows=None), VOCABULARY, "digest")
    assert not caplog.records


@pytest.mark.parametrize("method", ["normal", "mean_noise", "projected"])
def test_new_rows_of_a_text_model_are_made_by_the_method(save_llama, tmp_path, method):
    weights = save_llama(tmp_path / "llama", vocab_size=TEXT, initializer_range=0.3).state_dict()
    torch.manual_seed(0)
    save_visual_tokenizer(VisualTokenizer(SMALL), tmp_path / "tokenizer")
    words = Vocabulary(TEXT, SMALL.codebook.size)
    read = source(tmp_path / "llama", words, new_rows=method, visual_tokenizer=tmp_path / "tokenizer")
    shape = (words.codebook_size + 2, WIDTH)
    rows, text = read(NEW_HEAD, shape), weights[HEAD]
    assert torch.equal(rows, read(NEW_HEAD, shape))
    assert rows.isfinite().all()
    assert rows.norm(dim=1).mean() == pytest.approx(float(text.norm(dim=1).mean()), rel=0.3)
