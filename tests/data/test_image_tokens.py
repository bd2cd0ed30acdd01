"""A tokenizer of text and pictures: names for the ids of the vocabulary."""

import json
import time

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer

from lavit_dist.data.image_tokens import write_mixed_tokenizer
from lavit_dist.data.text_tokenizer import TextTokenizer, train_text_tokenizer
from lavit_dist.errors import UserError
from lavit_dist.models.vocabulary import Vocabulary

CODES = 16384
SECONDS = 20


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> TextTokenizer:
    return train_text_tokenizer(["a red circle on a blue square"], 280, tmp_path_factory.mktemp("text"), lower_case=False)


def test_a_document_of_text_and_codes_goes_there_and_back(text, tmp_path):
    words = Vocabulary(text.vocab_size, CODES)
    start = time.perf_counter()
    write_mixed_tokenizer(text.folder, tmp_path, words)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert time.perf_counter() - start < SECONDS
    assert len(tokenizer) == words.size
    document = f"a red circle[IMG]<img_0><img_7><img_{CODES - 1}>[/IMG] on a blue square"
    ids = tokenizer(document, add_special_tokens=False).input_ids
    codes = [words.code_offset + code for code in (0, 7, CODES - 1)]
    image = [words.image_start, *codes, words.image_end]
    assert ids == [*text.encode("a red circle"), *image, *text.encode(" on a blue square")]
    assert tokenizer.decode(ids) == document
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a red circle on a blue square"


def test_a_llama_tokenizer_keeps_its_pieces(tmp_path):
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "▁a",
        "r",
        "e",
        "d",
        "re",
        "red",
        "▁red",
    ]
    merges = [("▁", "a"), ("r", "e"), ("re", "d"), ("▁", "red")]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(pieces[:3])
    (tmp_path / "text").mkdir()
    tokenizer.save(str(tmp_path / "text" / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "text" / "tokenizer_config.json").write_text(json.dumps(settings))
    words = Vocabulary(TextTokenizer.load(tmp_path / "text").vocab_size, 8)
    write_mixed_tokenizer(tmp_path / "text", tmp_path / "mixed", words)
    mixed = AutoTokenizer.from_pretrained(tmp_path / "mixed")
    ids = mixed("a red[IMG]<img_3>[/IMG]", add_special_tokens=False).input_ids
    assert ids == [pieces.index("▁a"), pieces.index("▁red"), words.image_start, words.code_offset + 3, words.image_end]


def test_another_tokenizer_than_the_models_is_refused(text, tmp_path):
    with pytest.raises(UserError, match=f"has {text.vocab_size} ids, but the model was trained with {text.vocab_size + 1}"):
        write_mixed_tokenizer(text.folder, tmp_path, Vocabulary(text.vocab_size + 1, 8))


def test_names_that_are_taken_are_refused(text, tmp_path):
    write_mixed_tokenizer(text.folder, tmp_path, Vocabulary(text.vocab_size, 8))
    size = TextTokenizer.load(tmp_path).vocab_size
    with pytest.raises(UserError, match=rf"gives \[IMG\] the id {text.vocab_size} in place of {size}"):
        write_mixed_tokenizer(tmp_path, tmp_path, Vocabulary(size, 8))
