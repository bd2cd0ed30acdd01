"""Checkpoint folders that are whole or absent: temporary name, fsync, digests, rename, then `latest`.

ROOT/latest               the name of the newest step folder
ROOT/step-00001000/       what the trainable wrote, and manifest.json with the number of ranks and each file's size and sha256
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavit_dist.errors import UserError
from lavit_dist.files import read_json, sha256, sync_folder, write_atomically
from lavit_dist.parallel.distributed import barrier, gather_objects, rank, world_size

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
LATEST = "latest"
STEP = re.compile(r"step-\d{8}")
UNFINISHED = re.compile(r"\.step-\d{8}\.tmp")
"""Names of the folders that are ours to delete; copies under other names are the user's."""


@dataclass(frozen=True)
class SavedStep:
    """A complete checkpoint: `step` optimizer steps had been taken when `folder` was written."""

    step: int
    folder: Path
    ranks: int
    """How many processes wrote it."""


class CheckpointStore:
    """The checkpoints of one run, on a file system that all of its ranks share."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Calls `write(folder)` on every rank and commits the folder as step `step`. A crash leaves the steps before intact."""
        final = self.step_folder(step)
        temporary = self.root / f".{final.name}.tmp"
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        barrier()
        write(temporary)
        barrier()
        if rank() == 0:
            _write_manifest(temporary, step)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            sync_folder(self.root)
            write_atomically(self.root / LATEST, final.name.encode())
        barrier()
        return final

    def step_folder(self, step: int) -> Path:
        """Where step `step` is, or would be."""
        return self.root / f"step-{step:08d}"

    def latest(self) -> SavedStep | None:
        """The newest step whose files are as its manifest says, by rank 0's reading; damaged ones before it are told of. Collective.

        Raises `UserError`, on every rank, when there are steps and none is whole.
        """
        found: SavedStep | UserError | None = None
        if rank() == 0:
            try:
                found = self._newest_whole()
            except UserError as error:
                found = error
        found = gather_objects(found)[0]
        if isinstance(found, UserError):
            raise found
        return found

    def _newest_whole(self) -> SavedStep | None:
        newest = self.newest()
        if newest is None:
            return None
        folders = sorted(
            folder for folder in self.root.iterdir() if STEP.fullmatch(folder.name) and folder.name < newest.folder.name
        )
        problem: UserError | None = None
        for folder in (newest.folder, *reversed(folders)):
            try:
                verify(folder)
                return read_step(folder)
            except UserError as error:
                logger.warning("%s is passed over: %s", folder.name, error)
                problem = problem or error
        assert problem is not None
        raise problem

    def newest(self) -> SavedStep | None:
        """The step that `latest` names; None when no checkpoint was ever completed.

        Raises `UserError` when the named folder is missing.
        """
        pointer = self.root / LATEST
        if not pointer.exists():
            return None
        folder = self.root / (pointer.read_text(errors="replace").strip() or "(no name)")
        if not (folder / MANIFEST).exists():
            raise UserError(
                f"{pointer} names the checkpoint {folder.name}, which is missing or has no {MANIFEST};"
                f" write the name of a complete step-* folder into {pointer}, or remove it to start afresh."
            )
        return read_step(folder)

    def prune(self, keep_last: int) -> None:
        """Deletes all but the newest `keep_last` steps, those after `latest`, and folders that a crash left half-written."""
        if rank() == 0:
            latest = (self.root / LATEST).read_text().strip()
            steps = sorted(folder for folder in self.root.iterdir() if STEP.fullmatch(folder.name))
            until_latest = [folder for folder in steps if folder.name <= latest]
            for folder in set(steps) - set(until_latest[-keep_last:]):
                shutil.rmtree(folder)
            for folder in self.root.iterdir():
                if UNFINISHED.fullmatch(folder.name):
                    shutil.rmtree(folder)


def read_step(folder: Path) -> SavedStep:
    """What the manifest of a step folder says. Raises `UserError` when it is damaged."""
    manifest = _read_manifest(folder)
    return SavedStep(step=int(manifest["step"]), folder=folder, ranks=int(manifest["ranks"]))


def verify(folder: Path) -> None:
    """Raises `UserError` naming the first file of `folder` that is missing or differs from its manifest."""
    for name, recorded in _read_manifest(folder)["files"].items():
        path = folder / name
        if not path.exists() or path.stat().st_size != recorded["bytes"] or sha256(path) != recorded["sha256"]:
            raise UserError(
                f"The checkpoint file {path} is missing or damaged (its sha256 differs from {MANIFEST}); put it back, or remove {folder}: a"
                " run then goes on from the newest step that is whole, or starts afresh."
            )


def _read_manifest(folder: Path) -> dict[str, Any]:
    remedy = f"write the name of another step into {folder.parent / LATEST}"
    if not (folder / MANIFEST).exists():
        raise UserError(f"{folder} has no {MANIFEST}, so it was never complete; {remedy}.")
    manifest = read_json(folder / MANIFEST, remedy)
    if not isinstance(manifest, dict) or not {"step", "ranks", "files"} <= manifest.keys():
        raise UserError(f"{folder / MANIFEST} is damaged: it lacks the step, its ranks or its files; {remedy}.")
    return manifest


def _write_manifest(folder: Path, step: int) -> None:
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_atomically(folder / MANIFEST, json.dumps({"step": step, "ranks": world_size(), "files": files}, indent=1).encode())
