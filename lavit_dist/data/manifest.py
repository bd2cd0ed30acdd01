"""The manifest of an id set: the sorted records of its shards. Its sha256 is the set's fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lavit_dist.data.id_folder import IdFolder
from lavit_dist.data.id_shard import Encoding, ShardRecord
from lavit_dist.errors import UserError

MANIFEST = "manifest.json"
FORMAT_VERSION = 3


@dataclass(frozen=True)
class Manifest:
    """The shards of a set, all encoded alike."""

    folder: Path | str
    """A local path, or a URL."""
    shards: tuple[ShardRecord, ...]
    fingerprint: str
    """Hexadecimal sha256 of the manifest file."""

    @property
    def encoding(self) -> Encoding:
        """What turned pairs or texts into ids, the same for every shard."""
        return self.shards[0].encoding

    @property
    def program(self) -> str:
        """What makes such a set."""
        if self.encoding.latents is not None:
            return "data_prep/cache_latents.py"
        return "data_prep/pretokenize.py" if self.encoding.has_images else "data_prep/tokenize_text.py"

    def check_tokenizers(self, *, visual_tokenizer: str | None = None, text_tokenizer: str | None = None) -> None:
        """Raises `UserError`, naming both digests, when the set was made with another tokenizer than the one given.

        A set of text alone has no visual tokenizer, and goes with any; one of images alone has no text tokenizer.
        """
        expected = {"visual_tokenizer": visual_tokenizer, "text_tokenizer": text_tokenizer}
        for name, digest in expected.items():
            found = getattr(self.encoding, name)
            if digest is not None and found is not None and found != digest:
                raise UserError(
                    f"The ids in {self.folder} were made with the {name} {found[:16]}, but this run uses {digest[:16]};"
                    f" run {self.program} with this tokenizer, or give this run the one that the ids were made with."
                )


def write_manifest(folder: Path | IdFolder, shards: Sequence[ShardRecord]) -> Manifest:
    """Commits the set that `shards` make up. Raises `UserError` when they weren't all encoded alike."""
    records = sorted(shards, key=lambda shard: shard.name)
    content = {"format_version": FORMAT_VERSION, "shards": [dataclasses.asdict(record) for record in records]}
    place = folder if isinstance(folder, IdFolder) else IdFolder.of(folder, {})
    _check_encodings(place.name, records)
    place.write(MANIFEST, json.dumps(content, indent=1).encode())
    return parse_manifest(place.read(MANIFEST), place.name)


def load_manifest(folder: str | Path, storage_options: Mapping[str, Any] | None = None) -> Manifest:
    """Reads the manifest of the set in a local folder or at a URL, which fsspec opens with `storage_options`.

    Raises `UserError` when there is none, it can't be read, is empty, or mixes tokenizers.
    """
    place = IdFolder.of(folder, storage_options or {})
    try:
        content = place.read(MANIFEST)
    except OSError:
        raise UserError(
            f"{place.name} holds no id set: {MANIFEST} is missing; give the folder of one split, such as ids/train,"
            " or finish it with the program of data_prep/ that makes it."
        ) from None
    return parse_manifest(content, place.name)


def parse_manifest(content: bytes, folder: Path | str) -> Manifest:
    """The manifest whose file holds `content`, of the set in `folder`. Raises `UserError` as `load_manifest` does."""
    path = f"{folder}/{MANIFEST}"
    try:
        values = json.loads(content)
        if values["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {values['format_version']}, this program reads {FORMAT_VERSION}; remake it."
            )
        shards = TypeAdapter(tuple[ShardRecord, ...]).validate_python(values["shards"])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise UserError(
            f"{path} is not a manifest ({type(error).__name__}); run the program of data_prep/ that makes the set again."
        ) from error
    for shard in shards:
        if shard.name != PurePosixPath(shard.name).name or shard.name in ("", "..") or "\\" in shard.name:
            raise UserError(
                f"{path} names the shard {shard.name!r}, which is no plain file name, so the set isn't trusted; make it again."
            )
    if not any(shard.documents for shard in shards):
        raise UserError(f"The id set {folder} holds no document; see its *.quarantine.jsonl files for what was refused and why.")
    _check_encodings(folder, shards)
    return Manifest(folder, shards, hashlib.sha256(content).hexdigest())


def _check_encodings(folder: Path | str, shards: Sequence[ShardRecord]) -> None:
    first = shards[0]
    for shard in shards[1:]:
        for field in dataclasses.fields(Encoding):
            ours, theirs = getattr(first.encoding, field.name), getattr(shard.encoding, field.name)
            if ours != theirs:
                raise UserError(
                    f"The id set {folder} mixes encodings: {field.name} is {ours} in {first.name} but {theirs} in {shard.name};"
                    " remove the shards of one of them and run what made the set again."
                )
