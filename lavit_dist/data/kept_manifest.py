"""The manifest that a run was started with, kept in its folder: it tells which shards differ when the run is resumed on another set."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavit_dist.data.id_folder import IdFolder
from lavit_dist.data.manifest import MANIFEST, Manifest, parse_manifest
from lavit_dist.errors import UserError, check
from lavit_dist.files import write_atomically

NAMED = 5
"""Shards that a message names, of each kind."""


def keep_manifest(folder: Path, manifest: Manifest, storage_options: Mapping[str, Any]) -> None:
    """Copies the file of `manifest` to `folder`/<fingerprint>.manifest.json unless it is there."""
    path = _path(folder, manifest.fingerprint)
    if _read(path, manifest.fingerprint) is None:
        content = IdFolder.of(manifest.folder, storage_options).read(MANIFEST)
        check(
            hashlib.sha256(content).hexdigest() == manifest.fingerprint,
            f"{manifest.folder}/{MANIFEST} was changed while this run started; start it again when the id set is finished.",
        )
        write_atomically(path, content)


def check_fingerprint(fingerprint: str, manifest: Manifest, kept: Path | None) -> None:
    """Raises `UserError` unless `manifest` has the `fingerprint` of a checkpoint.

    It names the shards that differ where the folder `kept` has the manifest of that fingerprint.
    """
    if fingerprint == manifest.fingerprint:
        return
    content = None if kept is None else _read(_path(kept, fingerprint), fingerprint)
    reason = "" if content is None else f": {difference(parse_manifest(content, manifest.folder), manifest)}"
    raise UserError(
        f"The checkpoint was trained on the id set {fingerprint[:16]}, but {manifest.folder} is {manifest.fingerprint[:16]}{reason};"
        " give the set it was trained on, or start a new run."
    )


def difference(then: Manifest, now: Manifest) -> str:
    """Which shards changed, went missing or are new, the first few of each by name."""
    before, after = ({shard.name: shard for shard in manifest.shards} for manifest in (then, now))
    shared = sorted(before.keys() & after.keys())
    changed = [name for name in shared if before[name].sha256 != after[name].sha256]
    recorded = [name for name in shared if name not in set(changed) and before[name] != after[name]]
    kinds = {
        "changed": changed,
        "missing": sorted(before.keys() - after.keys()),
        "new": sorted(after.keys() - before.keys()),
        "with the same ids and another record": recorded,
    }
    found = [f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items() if names]
    return (
        f"of {len(before)} shards there are {', '.join(found)}"
        if found
        else "the shards are the same, but their manifest is written otherwise"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")


def _path(folder: Path, fingerprint: str) -> Path:
    return folder / f"{fingerprint}.manifest.json"


def _read(path: Path, fingerprint: str) -> bytes | None:
    """The content of a kept manifest; None when it is gone or damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    return content if hashlib.sha256(content).hexdigest() == fingerprint else None
