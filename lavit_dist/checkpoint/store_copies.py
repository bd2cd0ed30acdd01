"""Copies of checkpoints in a store that outlives a cluster's disk: made in the background, and fetched back by a command.

URL/step-00001000/    as under RUN_DIR/checkpoints; its manifest comes last and goes first, and a step without one doesn't count
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec

from lavit_dist.checkpoint.store import (
    MANIFEST,
    STEP,
    CheckpointStore,
    Manifest,
    Retention,
    SavedStep,
    parse_manifest,
    to_keep,
)
from lavit_dist.data.fetch import FetchError, StoreError, fetch, size_flaw, store
from lavit_dist.errors import Fault, UserError, check

logger = logging.getLogger(__name__)
ATTEMPTS, FIRST_WAIT = 5, 1.0
"""How often a file is offered or asked for, and seconds before the second time; the waits double."""


class StoreCopies:
    """Steps below one URL that fsspec reaches. One process uses it."""

    def __init__(self, url: str, storage_options: Mapping[str, Any], keep: Retention | None = None) -> None:
        """Raises `UserError` for a URL of no known kind, or one whose package is missing."""
        self.url, self.keep = url.rstrip("/"), keep or Retention()
        try:
            self.system, self.path = fsspec.core.url_to_fs(self.url, **storage_options)
        except (ImportError, ValueError, TypeError) as error:
            raise UserError(
                f"The store {url} can't be reached ({error}); check the URL, what the store needs to be installed, and storage_options."
            ) from error
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="copies")
        self._last: Future[None] | None = None
        self.needed: list[int] = []
        """The step that is being copied, and the one after it; both must stay meanwhile."""

    @property
    def busy(self) -> bool:
        """Whether a step is being copied."""
        return self._last is not None and not self._last.done()

    def begin(self, saved: SavedStep) -> None:
        """Copies a step after the one that is being copied; of several that wait, the newest alone. What fails is told, and is no one's end."""
        self.needed = [*self.needed[:1], saved.step] if self.busy else [saved.step]
        self._last = self._thread.submit(self._copy, saved)

    def steps(self) -> list[SavedStep]:
        """The whole steps, oldest first. Raises `UserError` when the store can't be listed."""
        try:
            self.system.invalidate_cache()
            listed = self.system.ls(self.path, detail=False) if self.system.exists(self.path) else []
            names = sorted(str(path).rstrip("/").rpartition("/")[2] for path in listed)
            manifests = {name: f"{self.path}/{name}/{MANIFEST}" for name in names if STEP.fullmatch(name)}
            contents = {name: self.system.cat_file(path) for name, path in manifests.items() if self.system.exists(path)}
        except Exception as error:  # every store raises exceptions of its own
            raise UserError(f"{self.url} can't be read ({type(error).__name__}: {error}); check the URL and access.") from error
        found = {name: self._manifest(name, content) for name, content in contents.items()}
        return [SavedStep(of.step, Path(name), of.ranks, of.score) for name, of in found.items()]

    def _manifest(self, step: str, content: bytes) -> Manifest:
        return parse_manifest(content, f"{self.url}/{step}/{MANIFEST}", "remove that step from the store")

    def fetch_newest(self, into: CheckpointStore) -> SavedStep:
        """Makes the newest step the newest one of `into`, which has none. Raises `UserError` when there is none, `Fault` when it can't be had."""
        check(into.newest() is None, f"{into.root} has checkpoints already; name another run folder, or remove them.")
        steps = self.steps()
        check(bool(steps), f"{self.url} holds no complete checkpoint; name the folder that holds the step-* folders.")
        newest = steps[-1]
        source = f"{self.path}/{newest.folder.name}"
        manifest = self._manifest(newest.folder.name, self.system.cat_file(f"{source}/{MANIFEST}"))
        folder = into.begin(newest.step)
        for name, recorded in manifest.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                fetch(
                    self.system,
                    f"{source}/{name}",
                    folder / name,
                    attempts=ATTEMPTS,
                    first_wait=FIRST_WAIT,
                    flaw=size_flaw(recorded.bytes),
                )
            except FetchError as error:
                raise Fault(f"{self.url}/{newest.folder}/{name} can't be fetched: {error}.") from error
        return into.adopt(manifest)

    def _copy(self, saved: SavedStep) -> None:
        if saved.step not in self.needed:
            logger.warning(
                "step %d isn't copied to %s, since the one before took until there was a newer one", saved.step, self.url
            )
            return
        self.needed = self.needed[self.needed.index(saved.step) :]
        target = f"{self.path}/{saved.folder.name}"
        files = [str(path.relative_to(saved.folder)) for path in sorted(saved.folder.rglob("*")) if path.is_file()]
        try:
            for folder in {target, *(f"{target}/{name}".rpartition("/")[0] for name in files)}:
                self.system.makedirs(folder, exist_ok=True)
            for name in sorted(files, key=lambda name: (name == MANIFEST, name)):
                store(self.system, saved.folder / name, f"{target}/{name}", attempts=ATTEMPTS, first_wait=FIRST_WAIT)
            self._prune(saved.step)
        except (StoreError, UserError, OSError) as error:
            logger.error("step %d couldn't be copied to %s: %s", saved.step, self.url, error)
        else:
            logger.info("copied step %d to %s", saved.step, self.url)

    def _prune(self, newest: int) -> None:
        """Removes what there is no reason to keep; steps after the newest are of a run that was gone back from."""
        steps = self.steps()
        kept = to_keep([step for step in steps if step.step <= newest], self.keep)
        for step in steps:
            if step.step not in kept:
                self.system.rm_file(f"{self.path}/{step.folder.name}/{MANIFEST}")
                self.system.rm(f"{self.path}/{step.folder.name}", recursive=True)
