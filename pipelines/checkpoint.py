"""Looking at checkpoints, removing some, and making a Hugging Face folder of one of the language model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from lavit_dist.checkpoint.hf import export_hf
from lavit_dist.checkpoint.llama_state import FACTS, WEIGHTS_FOLDER, read_facts
from lavit_dist.checkpoint.store import STEP, CheckpointStore, Retention, read_step, verify
from lavit_dist.checkpoint.store_copies import StoreCopies
from lavit_dist.checkpoint.weight_parts import WeightParts
from lavit_dist.engine.loop import ABOUT_FILE, LOOP_FILE
from lavit_dist.engine.run_folder import hold
from lavit_dist.errors import UserError, check
from lavit_dist.files import new_folder, read_json
from lavit_dist.observe.logs import setup_logging


def inspect(folder: str) -> None:
    """Prints what is in the step folder `folder`, of any training."""
    setup_logging()
    path = Path(folder)
    step, weights = read_step(path), WeightParts(path / WEIGHTS_FOLDER)
    guard = read_json(path / LOOP_FILE, "give another step folder", ("skipped", "roll_backs"))
    versions = read_json(path / ABOUT_FILE, "give another step folder", ("versions",))["versions"]
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    rows = {
        "optimizer steps taken": f"{step.step:,}",
        "steps skipped": f"{guard['skipped']:,}, as their gradient wasn't finite; gone back {guard['roll_backs']:,} times",
        "mean loss": "unknown" if step.score is None else f"{step.score:.4f} since the checkpoint before",
        "size": f"{size / 1e9:.3f} GB",
        "written by": f"{step.ranks} processes, with {', '.join(f'{name} {version}' for name, version in versions.items())}",
        "weights": f"{weights.count():,} numbers in {len(weights.names)} tensors",
    }
    rows |= _of_language_model(path) if (path / FACTS).exists() else {}
    console = Console(highlight=False)
    for name, value in rows.items():
        console.print(Text(f"{name:<21} {value}"), soft_wrap=True)


def _of_language_model(step: Path) -> dict[str, str]:
    facts = read_facts(step)
    return {
        "layout": ", ".join(f"{name} {value}" for name, value in facts.layout.items()),
        "precision": facts.precision,
        "vocabulary": f"{facts.text_size:,} text ids, {facts.codebook_size:,} codes",
        "rows trained on": ", ".join(f"{name} {state['rows_consumed']:,}" for name, state in facts.data["sources"].items()),
    }


def prune(folder: str, keep: Retention) -> None:
    """Removes the steps of a run, RUN_DIR/checkpoints, that `keep` has no reason for, and says which. The run must not be at work."""
    setup_logging()
    store = CheckpointStore(Path(folder))
    check(store.newest() is not None, f"{folder} holds no complete step; name RUN_DIR/checkpoints.")
    with hold(Path(folder).absolute().parent):
        console = Console(highlight=False)
        for step in store.damaged():
            console.print(Text(f"{step.name} is damaged and removed, too", "bold red"))
            shutil.rmtree(step)
        check(store.newest() is not None, f"No step of {folder} was whole; nothing is left to go on from.")
        gone = store.prune(keep)
        store.remove_unfinished()
    console.print(f"removed {len(gone)} steps: {', '.join(map(str, gone))}" if gone else "removed nothing")


def fetch(url: str, run_dir: str, storage_options: dict[str, Any]) -> None:
    """Makes the newest checkpoint that was copied below `url` the newest one of RUN_DIR, which has none."""
    setup_logging()
    root = Path(run_dir)
    with hold(root):
        saved = StoreCopies(url, storage_options).fetch_newest(CheckpointStore(root / "checkpoints"))
    Console(highlight=False).print(f"fetched step {saved.step} into {saved.folder}")


def verify_steps(folder: str) -> bool:
    """Reads the step folder `folder`, or all of a run's, and prints which are whole; returns whether all are."""
    setup_logging()
    root = Path(folder).absolute()
    steps = [root] if STEP.fullmatch(root.name) else sorted(path for path in root.glob("step-*") if STEP.fullmatch(path.name))
    check(bool(steps), f"{folder} is no step folder and holds none; name RUN_DIR/checkpoints, or a step-* folder in it.")
    console, whole = Console(highlight=False), True
    for step in steps:
        try:
            verify(step)
            console.print(f"{step.name}: whole")
        except UserError as error:
            whole = False
            console.print(Text(f"{step.name}: {error}", "bold red"), soft_wrap=True)
    return whole


def export(folder: str, output: str, text_tokenizer: str) -> None:
    """Writes the language model in the step folder `folder` as a Hugging Face folder, `output`."""
    setup_logging()
    verify(Path(folder))
    with new_folder(Path(output)) as new:
        export_hf(Path(folder), new, text_tokenizer)
    Console(highlight=False).print(f"wrote {output}")
