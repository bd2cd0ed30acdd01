"""A Hugging Face tokenizer that knows pictures: the text tokenizer with [IMG], [/IMG] and the codes as further tokens.

The released LaVIT has numbers for them and no names; these are ours. They are special tokens: decoding can leave them out.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from lavit_dist.data.text_tokenizer import CONFIG_FILE, FAST_FILE
from lavit_dist.errors import check
from lavit_dist.files import read_json, write_atomically
from lavit_dist.models.vocabulary import Vocabulary

MODEL_FILES = ("config.json", "generation_config.json", "lavit.json")
WEIGHTS = (".safetensors", ".bin", ".index.json")
IMAGE_START, IMAGE_END = "[IMG]", "[/IMG]"


def image_tokens(vocabulary: Vocabulary) -> list[str]:
    """The names of the ids from `text_size` on."""
    return [IMAGE_START, IMAGE_END, *(f"<img_{code}>" for code in range(vocabulary.codebook_size))]


def mixed_tokenizer(text_tokenizer: Path, vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer in `text_tokenizer` with the image tokens; nothing is written.

    Raises `UserError` when the text tokenizer has another number of ids than `vocabulary`, or such tokens of its own.
    """
    tokenizer = _backend(text_tokenizer)
    tokens = image_tokens(vocabulary)
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    check(
        size == vocabulary.text_size,
        f"The text tokenizer {text_tokenizer} has {size} ids, but the model was trained with {vocabulary.text_size}; give the one that"
        " its ids were made with.",
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in tokens])
    for token, expected in ((tokens[0], vocabulary.image_start), (tokens[-1], vocabulary.size - 1)):
        check(
            tokenizer.token_to_id(token) == expected,
            f"The text tokenizer {text_tokenizer} gives {token} the id {tokenizer.token_to_id(token)} in place of {expected}; rename its"
            " own tokens of that kind.",
        )
    return tokenizer


def write_mixed_tokenizer(text_tokenizer: Path, folder: Path, vocabulary: Vocabulary) -> None:
    """Writes the files of `text_tokenizer` to `folder`, and among them `mixed_tokenizer` as tokenizer.json; raises what that raises."""
    tokenizer = mixed_tokenizer(text_tokenizer, vocabulary)
    copy_text_tokenizer(text_tokenizer, folder)
    path = folder / CONFIG_FILE
    settings = read_json(path, "restore it") if path.exists() else {}
    # The classes of single models, such as LlamaTokenizer, build a tokenizer of their own and leave tokens of tokenizer.json out.
    write_atomically(path, json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=1).encode())
    write_atomically(folder / FAST_FILE, tokenizer.to_str().encode())


def copy_text_tokenizer(text_tokenizer: Path, folder: Path) -> None:
    """Copies a tokenizer's files. A folder may hold a model beside them, which is left where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in text_tokenizer.iterdir():
        if path.is_file() and path.name not in MODEL_FILES and not path.name.endswith(WEIGHTS):
            shutil.copyfile(path, folder / path.name)


def _backend(folder: Path) -> Tokenizer:
    if (folder / FAST_FILE).exists():
        return Tokenizer.from_file(str(folder / FAST_FILE))
    from transformers import AutoTokenizer  # converts sentencepiece and other older forms

    return Tokenizer.from_str(AutoTokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer.to_str())
