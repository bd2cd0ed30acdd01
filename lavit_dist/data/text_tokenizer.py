"""Text ids: any Hugging Face tokenizer folder, or a byte-level BPE trained here on the captions of a data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lavit_dist.errors import UserError
from lavit_dist.files import write_atomically

EOS = "<eos>"
PAD = "<pad>"
FAST_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEXT_TOKENIZER = "text_tokenizer"
"""Subfolder of an exported model that holds its text tokenizer; the tokenizer beside the model knows pictures as well."""
SLOW_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
"""What defines the ids of a tokenizer that has no tokenizer.json."""


class TextTokenizer:
    """Text to ids and back, without special tokens."""

    def __init__(
        self,
        folder: Path,
        encode: Callable[[str], list[int]],
        encode_batch: Callable[[list[str]], list[list[int]]],
        decode: Callable[[list[int]], str],
        size: int,
        eos_id: int,
    ) -> None:
        self.folder = folder
        self._encode = encode
        self._encode_batch = encode_batch
        self._decode = decode
        self.vocab_size = size
        """Number of text ids, T, special ones included."""
        self.eos_id = eos_id
        """The id that ends every document."""
        self.digest = _digest(folder, eos_id)
        """Hexadecimal sha256 of what decides the ids."""

    @classmethod
    def load(cls, folder: str | Path) -> TextTokenizer:
        """Reads a Hugging Face tokenizer folder, or that in an exported model's folder.

        Raises `UserError` when there is none, or it has no end-of-sequence token.
        """
        folder = Path(folder)
        if (folder / FAST_FILE).exists() and (folder / TEXT_TOKENIZER).is_dir():
            folder = folder / TEXT_TOKENIZER
        if not any((folder / name).exists() for name in (FAST_FILE, *SLOW_FILES)):
            raise UserError(
                f"{folder} is not a tokenizer folder: it has neither {FAST_FILE} nor {', '.join(SLOW_FILES)};"
                " give a Hugging Face tokenizer folder, or make one with data_prep/train_text_tokenizer.py."
            )
        return _load_fast(folder) if (folder / FAST_FILE).exists() else _load_slow(folder)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, each below `vocab_size`."""
        return self._encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each of `texts`, as `encode` gives them; on all threads that RAYON_NUM_THREADS allows."""
        return self._encode_batch(list(texts))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special ids are left out."""
        return self._decode(list(ids))


def train_text_tokenizer(captions: Iterable[str], vocab_size: int, folder: Path, *, lower_case: bool = True) -> TextTokenizer:
    """Trains a byte-level BPE of at most `vocab_size` ids on `captions` and saves it as a Hugging Face folder.

    Every text can be encoded and comes back unchanged, but for case if `lower_case`. The same captions give the same files.
    """
    tokenizer = Tokenizer(models.BPE())
    if lower_case:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS, PAD], initial_alphabet=alphabet, min_frequency=2, show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
    }
    write_atomically(folder / CONFIG_FILE, json.dumps(settings, indent=1).encode())
    write_atomically(folder / FAST_FILE, tokenizer.to_str(pretty=True).encode())
    return TextTokenizer.load(folder)


def _load_fast(folder: Path) -> TextTokenizer:
    """Through the `tokenizers` library alone: importing transformers' AutoTokenizer takes seconds."""
    try:
        tokenizer = Tokenizer.from_file(str(folder / FAST_FILE))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{folder / FAST_FILE} can't be read ({error}); replace it by a sound copy.") from error
    tokenizer.encode_special_tokens = True  # a caption that spells <eos> has its letters, not the end of a document
    eos_id = tokenizer.token_to_id(_eos_token(folder))
    if eos_id is None:
        raise _no_eos(folder)
    return TextTokenizer(
        folder,
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        lambda texts: [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)],
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        tokenizer.get_vocab_size(with_added_tokens=True),
        eos_id,
    )


def _load_slow(folder: Path) -> TextTokenizer:
    """Through transformers, which converts sentencepiece and other older forms."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"The tokenizer folder {folder} can't be read by transformers ({error}); replace it by a sound copy."
        ) from error
    if tokenizer.eos_token_id is None:
        raise _no_eos(folder)
    return TextTokenizer(
        folder,
        lambda text: tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True),
        lambda texts: tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"],
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        len(tokenizer),
        tokenizer.eos_token_id,
    )


def _eos_token(folder: Path) -> str:
    """The `eos_token` of the folder's configuration, which holds it as a string or as `{"content": string}`."""
    path = folder / CONFIG_FILE
    settings: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    token = settings.get("eos_token") or ""
    return token["content"] if isinstance(token, dict) else token


def _no_eos(folder: Path) -> UserError:
    return UserError(
        f"The tokenizer in {folder} names no known eos_token in {CONFIG_FILE}; every document ends with it, so set one."
    )


def _digest(folder: Path, eos_id: int) -> str:
    names = (FAST_FILE,) if (folder / FAST_FILE).exists() else SLOW_FILES
    digest = hashlib.sha256(f"eos {eos_id}\n".encode())
    for path in (folder / name for name in names):
        if path.exists():
            digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()
