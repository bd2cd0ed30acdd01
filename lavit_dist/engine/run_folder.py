"""The folder of one run: its resolved configuration, metrics, checkpoints, and at the end its product.

RUN_DIR/config.yaml      the resolved configuration
RUN_DIR/metrics.jsonl    a record per step
RUN_DIR/tensorboard/     the same for TensorBoard
RUN_DIR/checkpoints/     steps to resume from
RUN_DIR/data/            of pretraining: the manifest of the ids, which tells what changed if they are not the same on resume
RUN_DIR/model/           the product; it appears whole when the run is done
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from lavit_dist.config.base import save_config, to_dict, without_secrets
from lavit_dist.errors import Fault, UserError
from lavit_dist.files import PASSING, remove_leftovers, sync_folder, sync_tree
from lavit_dist.parallel.distributed import barrier, rank

logger = logging.getLogger(__name__)
LOCK = ".lock"
LOCK_SECONDS = 10.0
"""How long a process that is about to end, such as one of a run that failed a moment ago, is waited for."""
MAY_CHANGE = (
    *(
        "logging",
        "checkpoint",
        "faults",
        "health",
        "num_threads",
        "run_dir",
        "ray",
        "verify_inputs",
        "tower",
        "id_cache",
        "plan_cache",
    ),
    *("feature_cache_bytes", "feature_disk_bytes", "feature_folder"),
    *("report_seconds", "storage_options", "fetch_attempts", "cache_folder", "output"),
    *(f"images.{name}" for name in ("shards", "decode_threads", "prefetch_batches", "pixel_cache_bytes", "fetch_attempts")),
    *(f"images.{name}" for name in ("cache_folder", "cache_bytes", "storage_options")),
)
"""Settings that a resumed run may change, or parts of them: they decide what is reported, when and where, never what is computed. Where
images and tower lie may change, for checkpoints know the former by name and size and the latter by digest."""


class RunFolder:
    """Paths of a run; `open` refuses a folder that belongs to a run with other settings."""

    def __init__(self, root: str | Path, may_change: tuple[str, ...] = ()) -> None:
        """`may_change` names settings that a run may change, beside `MAY_CHANGE`, until it is done: its checkpoints answer for them."""
        self.root = Path(root)
        self.may_change = may_change
        self.config = self.root / "config.yaml"
        self.checkpoints = self.root / "checkpoints"
        self.data = self.root / "data"
        self.model = self.root / "model"

    @property
    def done(self) -> bool:
        """Whether the run's product is there."""
        return self.model.exists()

    def check_config(self, value: Any) -> None:
        """Raises `UserError` naming the first setting of `value` that differs from those the folder was made with."""
        if not self.config.exists():
            return
        try:
            found = yaml.safe_load(self.config.read_text())
        except (yaml.YAMLError, UnicodeDecodeError):
            found = None
        if not isinstance(found, dict):
            raise UserError(
                f"{self.config} is damaged: it holds no settings; remove it if the settings of this run are those of the runs before."
            )
        may_change = MAY_CHANGE if self.done else (*MAY_CHANGE, *self.may_change)
        then, now = _flatten(found), _flatten(to_dict(value))
        for key in sorted(then.keys() | now.keys()):
            changeable = any(key == name or key.startswith(f"{name}.") for name in may_change)
            if not changeable and then.get(key) != now.get(key):
                raise UserError(
                    f"{self.root} belongs to a run with {key} = {then.get(key)!r}, but now {key} = {now.get(key)!r};"
                    " give this run another run_dir, or remove that folder to start afresh."
                )

    def open(self, value: Any) -> None:
        """Checks the settings and writes them down; the folder is this run's alone until the process ends. Collective.

        Raises `UserError` for other settings than those the folder was made with, and when another run works in it.
        """
        self.check_config(value)
        barrier()
        if rank() == 0:
            self.lock = hold(self.root)
            remove_leftovers(self.root)
            if not self.config.exists() or yaml.safe_load(self.config.read_text()) != without_secrets(to_dict(value)):
                save_config(value, self.config)
        barrier()

    def publish(self, write: Callable[[Path], None]) -> None:
        """Lets rank 0 write the product with `write(folder)`; it appears as RUN_DIR/model whole or not at all. Collective."""
        if rank() == 0:
            temporary = self.root / ".model.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write(temporary)
            sync_tree(temporary)
            temporary.rename(self.model)
            sync_folder(self.root)
            logger.info("wrote %s", self.model)
        barrier()


def hold(root: Path, setting: str = "run_dir") -> FileLock:
    """Makes the folder, which `setting` names, and takes its lock, which lasts until it is released or the process ends.

    Raises `UserError` when another process holds it, and for a folder that can't be written, `Fault` when that may pass.
    """
    lock = FileLock(root / LOCK)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise UserError(f"Another run is at work in {root}; wait for it to end, or give this one another {setting}.") from None
    except OSError as error:
        if error.errno in PASSING:
            raise Fault(
                f"{setting} {root} can't be written at the moment ({error.strerror}); make room or mend the disk, and start again."
            ) from error
        raise UserError(f"{setting} {root} can't be written ({error.strerror}); name a folder that can be.") from error
    return lock


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their full names; the order of phases is one too."""
    flat: dict[str, Any] = {}
    if prefix == "phases.":
        flat["phases (in order)"] = list(values)
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
