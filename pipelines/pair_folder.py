"""What the stages that make pairs share: a folder that is made once, with a summary as its last word.

RUN_DIR/config.yaml     the resolved configuration
RUN_DIR/train/          00000.tar, 00000.quarantine.jsonl, ...
RUN_DIR/heldout/        the same
RUN_DIR/summary.json    counts; it appears when the set is complete
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavit_dist.config.ingest import IngestConfig
from lavit_dist.config.make_shapes import MakeShapesConfig
from lavit_dist.data.pair_writer import PairWriter
from lavit_dist.data.pairs import SPLITS
from lavit_dist.engine.run_folder import LOCK, RunFolder
from lavit_dist.errors import check
from lavit_dist.files import read_json, write_atomically

logger = logging.getLogger(__name__)
SUMMARY = "summary.json"


def open_pair_folder(config: IngestConfig | MakeShapesConfig, source_digest: str = "") -> bool:
    """Prepares RUN_DIR and returns True, or says that the set is there already and returns False.

    What an interrupted run left is removed. Raises `UserError` when the folder holds anything else, or was made with other settings
    or from a source that has changed since.
    """
    folder = RunFolder(config.run_dir)
    check_is_ours(folder)
    summary_path = folder.root / SUMMARY
    folder.open(config)
    if summary_path.exists():
        summary = read_json(summary_path, "remove it to make the set again")
        check(
            summary.get("source_digest") == source_digest,
            f"The source has changed since {folder.root} was made from it; give another run_dir, or remove that folder to ingest it afresh.",
        )
        logger.info("%s is complete already: %s", folder.root, describe(summary))
        return False
    for split in SPLITS:
        shutil.rmtree(folder.root / split, ignore_errors=True)
    return True


def check_is_ours(folder: RunFolder) -> None:
    """Raises `UserError` when a run folder holds files and no configuration, so that none of ours mix with them."""
    check(
        folder.config.exists()
        or not folder.root.exists()
        or (folder.root.is_dir() and {path.name for path in folder.root.iterdir()} <= {LOCK}),
        f"run_dir {folder.root} is a file, or holds files that this program didn't make; name a new or an empty folder.",
    )


def close_pair_folder(root: Path, writers: Mapping[str, PairWriter], source_digest: str = "") -> None:
    """Writes the summary, which marks the set as complete, and logs it."""
    reasons: Counter[str] = sum((writer.reasons for writer in writers.values()), Counter())
    summary = {
        "splits": {
            split: {"samples": writer.samples, "captions": writer.captions, "shards": writer.shards}
            for split, writer in writers.items()
        },
        "quarantined": dict(sorted(reasons.items())),
        "source_digest": source_digest,
    }
    write_atomically(root / SUMMARY, json.dumps(summary, indent=1).encode())
    logger.info("wrote %s: %s", root, describe(summary))


def describe(summary: dict[str, Any]) -> str:
    """A summary in a line."""
    splits = ", ".join(
        f"{split} {counts['samples']} pairs ({counts['captions']} captions)" for split, counts in summary["splits"].items()
    )
    reasons = ", ".join(f"{reason} {count}" for reason, count in summary["quarantined"].items())
    return f"{splits}; quarantined: {reasons or 'none'}"
