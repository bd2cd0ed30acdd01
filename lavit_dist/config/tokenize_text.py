"""Settings of `data_prep/tokenize_text.py`."""

from __future__ import annotations

from dataclasses import field

from pydantic import NonNegativeInt, PositiveInt

from lavit_dist.config.base import Seed, config
from lavit_dist.config.ray import RayConfig
from lavit_dist.errors import check

LARGEST_SHARD = 1 << 30
"""Bytes of text in a shard: its columns count ids in 32 bits, and an actor holds its documents in memory."""


@config
class TokenizeTextConfig:
    """Which texts become ids, by which tokenizer, and how the work is cut."""

    run_dir: str
    """Folder of the id set: train/ and heldout/, each with shards and a manifest."""
    corpus: str | tuple[str, ...]
    """The files, .jsonl, .jsonl.gz, .jsonl.zst (or .json.gz, .json.zst of JSON lines) and .parquet: a folder, a file, a pattern (`*`, `?`,
    `**/`, `{00..99}`), a URL of any of these, or a list of those."""
    text_tokenizer: str
    """Folder of a Hugging Face tokenizer."""
    text_column: str = "text"
    """Column with the text."""
    key_column: str | None = None
    """Column with a name for the row, a string or an integer; by default it is the file's name and the number of the row, from 1."""
    seed: Seed = 0
    """Decides, with a row's key, whether it is held out."""
    heldout_fraction: float = 0.005
    """Share of the rows that goes to the held-out split, chosen by a hash of the key."""
    min_characters: NonNegativeInt = 0
    """Shorter texts are left out and counted. Empty ones are quarantined."""
    max_characters: PositiveInt | None = None
    """Longer texts are left out and counted; by default none. What becomes of documents longer than a row is pretraining's to say
    (`documents.too_long`)."""
    bytes_per_shard: PositiveInt = 1 << 26
    """Text that makes one id shard, bytes (of lines, with their JSON): 64 MiB give about 35 MB of ids below 65,536. Smaller files are joined,
    larger ones give several shards."""
    storage_options: dict[str, str | int | float | bool | None] = field(default_factory=dict)
    """What fsspec's file system is opened with where the corpus is remote, such as `anon`; credentials belong into its own files."""
    cache_folder: str | None = None
    """Folder on each node for files of stores while they are read. None: the system's folder of temporary files."""
    verify_inputs: bool = True
    """Whether the files of finished shards are hashed again before the shards are passed over; names and sizes always are compared."""
    ray: RayConfig = RayConfig()

    def validate(self) -> None:
        check(bool(self.corpus), "corpus is empty; name a folder of texts, a pattern, a URL, or a list of those.")
        check(
            0 <= self.heldout_fraction <= 0.5,
            f"heldout_fraction {self.heldout_fraction} must lie between 0 and 0.5; most texts are for training.",
        )
        check(
            self.max_characters is None or self.min_characters <= self.max_characters,
            f"min_characters {self.min_characters} is above max_characters {self.max_characters}, so that no text would be left; lower it.",
        )
        check(
            self.bytes_per_shard <= LARGEST_SHARD,
            f"bytes_per_shard {self.bytes_per_shard} must be at most {LARGEST_SHARD}; 64 MiB is usual.",
        )
        check(
            self.key_column != self.text_column,
            f"key_column and text_column are both {self.text_column}; leave key_column out, or name a column of keys.",
        )
