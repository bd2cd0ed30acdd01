"""Checkpoint folders that are whole or absent: temporary name, fsync, digests, rename, then `latest`.

ROOT/latest               the name of the newest step folder
ROOT/step-00001000/       what ranks wrote, and manifest.json with their number and each file's size and sha256
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from lavit_dist.checkpoint.snapshot import FileRecord
from lavit_dist.errors import UserError
from lavit_dist.files import sha256, sync_folder, write_atomically
from lavit_dist.parallel.distributed import gather_objects, rank, world_size

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
LATEST = "latest"
STEP = re.compile(r"step-\d{8}")
FILE = re.compile(r"(\w[\w.-]*/)*\w[\w.-]*")
"""Names of files that a manifest may list."""
UNFINISHED, REPLACED = re.compile(r"\.step-\d{8}\.tmp"), re.compile(r"\.(step-\d{8})\.replaced")
"""Names of the folders that are ours to delete; copies under other names are the user's."""


@dataclass(frozen=True)
class SavedStep:
    """A complete checkpoint: `step` optimizer steps had been taken when `folder` was written."""

    step: int
    folder: Path
    ranks: int
    """How many processes wrote it."""
    score: float | None = None
    """The mean loss of the steps since the checkpoint before; the lower, the better."""


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    step: int
    ranks: int
    score: float | None
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class Retention:
    """Which steps are kept, beside the newest."""

    last: int = 2
    """How many of the newest."""
    every: int = 0
    """Steps that are multiples of it stay for good; 0 keeps none for that."""
    best: int = 0
    """How many of those with the lowest score."""


class CheckpointStore:
    """The checkpoints of one run, on a file system that all of its ranks share. `CheckpointWriter` fills it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def begin(self, step: int) -> Path:
        """Makes the empty folder that ranks write step `step` into. Only rank 0 may call it."""
        temporary = self.temporary(step)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        return temporary

    def commit(self, step: int, files: Mapping[str, FileRecord], ranks: int, score: float | None = None) -> Path:
        """Makes what ranks wrote step `step`, the newest; a crash before it is done leaves the steps before intact. Only rank 0 may call it.

        Steps after it are of a run that was gone back from, and are removed.
        """
        self._complete(Manifest(step, ranks, score, {name: files[name] for name in sorted(files)}))
        return self.step_folder(step)

    def adopt(self, manifest: Manifest) -> SavedStep:
        """Makes what was copied into the folder of `begin` a step, the newest. Raises `UserError` when it isn't what `manifest` says."""
        self._write_manifest(manifest)
        verify(self.temporary(manifest.step))
        self._complete(manifest)
        return read_step(self.step_folder(manifest.step))

    def _write_manifest(self, manifest: Manifest) -> None:
        write_atomically(self.temporary(manifest.step) / MANIFEST, json.dumps(asdict(manifest), indent=1).encode())

    def _complete(self, manifest: Manifest) -> None:
        final, temporary = self.step_folder(manifest.step), self.temporary(manifest.step)
        self._write_manifest(manifest)
        for folder in {temporary, *((temporary / name).parent for name in manifest.files)}:
            sync_folder(folder)
        replaced = self.root / f".{final.name}.replaced"
        if final.exists():
            final.rename(replaced)
        temporary.rename(final)
        sync_folder(self.root)
        self._point_at(final)
        shutil.rmtree(replaced, ignore_errors=True)

    def go_back_to(self, saved: SavedStep) -> None:
        """Makes `saved` the newest step, and removes those after it. Only rank 0 may call it."""
        self._point_at(saved.folder)

    def _point_at(self, newest: Path) -> None:
        write_atomically(self.root / LATEST, newest.name.encode())
        for folder in self._folders():
            if folder.name > newest.name:
                shutil.rmtree(folder, ignore_errors=True)

    def step_folder(self, step: int) -> Path:
        """Where step `step` is, or would be."""
        return self.root / f"step-{step:08d}"

    def temporary(self, step: int) -> Path:
        """Where step `step` is while it is written."""
        return self.root / f".{self.step_folder(step).name}.tmp"

    def latest(self, until: int | None = None) -> SavedStep | None:
        """The newest step whose files are as its manifest says, of which each rank reads a share; damaged ones are told of. Collective.

        Steps after `until` don't count. Raises `UserError`, on every rank, when there are steps and none is whole.
        """
        found = gather_objects(self._names(until) if rank() == 0 else None)[0]
        if isinstance(found, UserError):
            raise found
        problems = []
        for folder in [self.root / name for name in found or []]:
            flaws = [flaw for flaw in gather_objects(_flaw(folder, share=(rank(), world_size()))) if flaw]
            if not flaws:
                return read_step(folder)
            problems.append(flaws[0])
            if rank() == 0:
                logger.warning("%s is passed over: %s", folder.name, flaws[0])
        if problems:
            raise UserError(problems[0])
        return None

    def newest(self, files: Collection[str] = ()) -> SavedStep | None:
        """The newest step of which `files` alone are known to be whole; None when no checkpoint was ever completed.

        Raises `UserError` as `latest` does.
        """
        problems = []
        for folder in self._candidates():
            flaw = _flaw(folder, files)
            if flaw is None:
                return read_step(folder)
            problems.append(flaw)
        if problems:
            raise UserError(problems[0])
        return None

    def _names(self, until: int | None) -> list[str] | UserError:
        """Of the steps to go on from, the newest first, or why there is none."""
        try:
            names = [folder.name for folder in self._candidates()]
        except UserError as error:
            return error
        return [name for name in names if until is None or name <= self.step_folder(until).name]

    def _folders(self) -> list[Path]:
        """The step folders, oldest first."""
        return sorted(folder for folder in self.root.iterdir() if STEP.fullmatch(folder.name)) if self.root.exists() else []

    def _candidates(self) -> list[Path]:
        """The steps to go on from, the newest first: those until the one that `latest` names, without which there are none.

        Raises `UserError` when it names something else and there is no step to take in its place.
        """
        pointer = self.root / LATEST
        if not pointer.exists() and not self._folders():
            return []
        name = pointer.read_text(errors="replace").strip() if pointer.exists() else ""
        named = STEP.fullmatch(name) is not None
        folders = [folder for folder in self._folders() if not named or folder.name <= name]
        if not folders:
            raise UserError(
                f"{pointer} names the checkpoint {name or '(no name)'}, which is missing, and there is none before it;"
                f" write the name of a complete step-* folder into {pointer}, or remove it to start afresh."
            )
        if folders[-1].name != name:
            logger.warning("%s names %s, which is missing; %s is the newest step", pointer, name or "nothing", folders[-1].name)
        return folders[::-1]

    def prune(self, keep: Retention, spare: Collection[int] = ()) -> list[int]:
        """Deletes the steps that `keep` has no reason for, and those after the newest; says which those were.

        `spare` stay this time. Only rank 0 may call it.
        """
        pointer = self.root / LATEST
        newest = pointer.read_text(errors="replace").strip() if pointer.exists() else ""
        steps = []
        for folder in self._folders():
            with contextlib.suppress(UserError):  # what can't be read isn't removed behind anyone's back
                steps.append(read_step(folder))
        until_newest = [step for step in steps if not STEP.fullmatch(newest) or step.folder.name <= newest]
        kept = to_keep(until_newest, keep)
        gone = [step for step in steps if step.step not in kept and step.step not in spare]
        for step in gone:
            shutil.rmtree(step.folder)
        return sorted(step.step for step in gone)

    def damaged(self) -> list[Path]:
        """The step folders that are not what their manifests say; reads them all."""
        return [folder for folder in self._folders() if _flaw(folder) is not None]

    def remove_unfinished(self) -> None:
        """Deletes folders that a crash, or a full disk, left half-written. Only rank 0 may call it."""
        for folder in list(self.root.iterdir()) if self.root.exists() else []:
            replaced = REPLACED.fullmatch(folder.name)
            if replaced and not (self.root / replaced[1]).exists():
                folder.rename(self.root / replaced[1])  # what was to replace it never came
            elif replaced or UNFINISHED.fullmatch(folder.name):
                shutil.rmtree(folder, ignore_errors=True)


def to_keep(steps: Sequence[SavedStep], keep: Retention) -> set[int]:
    """Which of `steps`, oldest first, there is a reason to keep."""
    scored = sorted((step for step in steps if step.score is not None), key=lambda step: step.score or 0.0)
    regular = [step for step in steps if keep.every and step.step % keep.every == 0]
    return {step.step for step in [*steps[-keep.last :], *scored[: keep.best], *regular]}


def read_step(folder: Path) -> SavedStep:
    """What the manifest of a step folder says. Raises `UserError` when it is damaged."""
    manifest = _read_manifest(folder)
    return SavedStep(manifest.step, folder, manifest.ranks, manifest.score)


def verify(folder: Path, files: Collection[str] | None = None, share: tuple[int, int] = (0, 1)) -> None:
    """Raises `UserError` naming the first file of `folder`, or the first of `files` in it, that is missing or differs from its manifest.

    `share` is (which, of how many): the part of the files that is read.
    """
    which, of = share
    for name, recorded in sorted(_read_manifest(folder).files.items())[which::of]:
        if files is not None and name not in files:
            continue
        path = folder / name
        if not path.exists() or path.stat().st_size != recorded.bytes or sha256(path) != recorded.sha256:
            raise UserError(
                f"The checkpoint file {path} is missing or damaged (its sha256 differs from {MANIFEST}); put it back, or remove {folder}: a"
                " run then goes on from the newest step that is whole, or starts afresh."
            )


def _flaw(folder: Path, files: Collection[str] | None = None, share: tuple[int, int] = (0, 1)) -> str | None:
    """What `verify` says is wrong, or what keeps it from reading."""
    try:
        verify(folder, files, share)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{folder} can't be read ({type(error).__name__}: {error}); mend the disk, or remove it."
    return None


def _read_manifest(folder: Path) -> Manifest:
    remedy = f"name another step-* folder, or write its name into {folder.parent / LATEST}"
    if not (folder / MANIFEST).exists():
        raise UserError(f"{folder} has no {MANIFEST}, so it is no complete step; {remedy}.")
    manifest = parse_manifest((folder / MANIFEST).read_bytes(), str(folder / MANIFEST), remedy)
    named = re.search(r"step-(\d{8})", folder.name)
    if named and int(named[1]) != manifest.step:
        raise UserError(
            f"{folder / MANIFEST} is damaged: it is of step {manifest.step}, which is not that of its folder; {remedy}."
        )
    return manifest


def parse_manifest(content: bytes, name: str, remedy: str) -> Manifest:
    """The manifest that holds `content`; raises `UserError`, about `name`, when it is none, or names files outside of its folder."""
    try:
        manifest = TypeAdapter(Manifest).validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{name} is damaged ({'.'.join(map(str, first['loc']))}: {first['msg']}); {remedy}.") from error
    for file in manifest.files:
        if not FILE.fullmatch(file):
            raise UserError(f"{name} names {file}, which lies outside of its folder, so it isn't trusted; {remedy}.")
    return manifest
