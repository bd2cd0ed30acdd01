"""Text comes back from its ids, and Hugging Face reads the same folder alike."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GPT2Tokenizer

from lavit_dist.data.text_tokenizer import TextTokenizer, train_text_tokenizer
from lavit_dist.errors import UserError

CAPTIONS = [f"A {colour} {shape} on grey." for colour in ("red", "green", "blue") for shape in ("circle", "square")] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return train_text_tokenizer(CAPTIONS, 300, folder)


# Letters up to here are lower-cased alike by every version of Unicode that Python and the tokenizers library may have.
CHARACTERS = st.characters(max_codepoint=0x2FFF) | st.sampled_from("\u6f22\U0001f600")


@given(st.text(CHARACTERS) | st.sampled_from(["<eos>", "<pad>", "a<eos><EOS> <pad>b"]))
def test_any_text_comes_back_in_lower_case(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "".join(character.lower() for character in text)


def test_case_is_kept_on_request(tmp_path):
    tokenizer = train_text_tokenizer(CAPTIONS, 300, tmp_path, lower_case=False)
    assert tokenizer.decode(tokenizer.encode(CAPTIONS[0])) == CAPTIONS[0]


def test_words_of_the_captions_become_few_ids(tokenizer):
    assert tokenizer.vocab_size <= 300
    assert len(tokenizer.encode(CAPTIONS[0])) <= 8


@given(st.lists(st.text(CHARACTERS), max_size=5))
def test_a_batch_has_the_ids_of_its_texts(tokenizer, texts):
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_special_ids_are_left_out_of_text(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("a red circle"), tokenizer.eos_id]) == "a red circle"


def test_hugging_face_loads_the_same_tokenizer(tokenizer, folder):
    theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    assert theirs.eos_token_id == tokenizer.eos_id
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.pad_token == "<pad>"
    for caption in CAPTIONS[:6]:
        assert theirs.encode(caption, add_special_tokens=False) == tokenizer.encode(caption)


def test_the_same_captions_give_the_same_digest_and_others_another(tokenizer, tmp_path):
    assert train_text_tokenizer(CAPTIONS, 300, tmp_path / "same").digest == tokenizer.digest
    assert train_text_tokenizer(CAPTIONS, 280, tmp_path / "other").digest != tokenizer.digest


def test_a_folder_without_tokenizer_json_is_read_by_transformers(tokenizer, folder, tmp_path):
    Tokenizer.from_file(str(folder / "tokenizer.json")).model.save(str(tmp_path))
    settings = {"tokenizer_class": GPT2Tokenizer.__name__, "eos_token": "<eos>", "unk_token": "<eos>", "bos_token": "<eos>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    older = TextTokenizer.load(tmp_path)
    assert older.encode("a red circle") == tokenizer.encode("a red circle")
    assert older.decode(older.encode("a red circle")) == "a red circle"
    assert older.eos_id == tokenizer.eos_id
    assert older.eos_id not in older.encode("a <eos>")
    texts = ["a red circle", "a <eos>", "blue"]
    assert older.encode_batch(texts) == [older.encode(text) for text in texts]


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a tokenizer folder"):
        TextTokenizer.load(tmp_path)


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="can't be read"):
        TextTokenizer.load(tmp_path)


def test_a_tokenizer_without_eos_is_refused(folder, tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match="eos_token"):
        TextTokenizer.load(tmp_path)
