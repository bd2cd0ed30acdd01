"""The pictures that documents of ids were made from, where their tars are at hand."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path

import yaml
from PIL import Image

from lavit_dist.data.manifest import Manifest
from lavit_dist.data.picture import decode_image
from lavit_dist.data.quarantine import SampleError
from lavit_dist.data.tar_reader import FileLocation, key_and_suffix, read_bytes
from lavit_dist.errors import check

NAMELESS = 100
"""Bytes from which on a name doesn't fit a member's own header."""


class SourceImages:
    """Pictures by key and location, out of the first folder whose tar is the one that was tokenized."""

    def __init__(self, folders: Sequence[Path], manifest: Manifest) -> None:
        """Looks in `folders` for the inputs of `manifest`."""
        self.folders = folders
        self._sizes: dict[str, set[int]] = {}
        for shard in manifest.shards:
            for tar in shard.inputs:
                self._sizes.setdefault(tar.name, set()).add(tar.size)

    def picture(self, key: str, location: FileLocation) -> Image.Image:
        """The picture of a pair. Raises `SampleError`, whose message says where it was looked for, when it can't be had.

        Tars of different splits have the same names: one counts only if it has the size in the manifest, and at `location` a file of that
        key and size.
        """
        found = [path for folder in self.folders if (path := folder / location.shard).is_file()]
        for path in found:
            if self._is_right(path, key, location):
                return decode_image(read_bytes(FileLocation(str(path), location.offset, location.size)))
        if found:
            raise SampleError("other_tar", f"{' and '.join(map(str, found))} is not the tar that was tokenized")
        places = ", ".join(map(str, self.folders)) or "no folder, since the ids are remote"
        raise SampleError("missing_tar", f"{location.shard} was looked for in {places}")

    def _is_right(self, path: Path, key: str, location: FileLocation) -> bool:
        sizes = self._sizes.get(location.shard)
        header_at = location.offset - tarfile.BLOCKSIZE
        if header_at < 0 or (sizes is not None and path.stat().st_size not in sizes):
            return False
        try:
            header = read_bytes(FileLocation(str(path), header_at, tarfile.BLOCKSIZE))
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, SampleError):
            return False
        named = key_and_suffix(member.name)
        is_named = len(member.name.encode("utf-8", "surrogateescape")) >= NAMELESS or (named is not None and named[0] == key)
        return member.size == location.size and is_named


def image_folders(manifest: Manifest, given: str | None) -> list[Path]:
    """Folders in which the tars of an id set may lie: `given` and its folder of the same split.

    Without `given`: those that pretokenize's config.yaml beside the split names, `pairs` beside the whole set, and the split itself.
    Raises `UserError` when `given` is no folder.
    """
    split = Path(manifest.folder).name
    if given is not None:
        check(Path(given).is_dir(), f"--images {given} is no folder; name the folder of the tars that the ids were made from.")
        return [Path(given), Path(given) / split]
    if isinstance(manifest.folder, str):
        return []
    whole = manifest.folder.absolute().parent
    pairs = [Path(named)] if (named := _pairs_of(whole / "config.yaml")) else []
    pairs.append(whole.parent / "pairs")
    folders = [folder for each in pairs for folder in (each / split, each)]
    return list(dict.fromkeys([*folders, manifest.folder]))


def _pairs_of(config_file: Path) -> str | None:
    """`pairs` of a run of pretokenize; None when there is none."""
    try:
        values = yaml.safe_load(config_file.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None
    pairs = values.get("pairs") if isinstance(values, dict) else None
    return pairs if isinstance(pairs, str) else None
