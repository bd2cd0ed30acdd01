"""Looking at checkpoints of the language model, and making a Hugging Face folder of one."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from lavit_dist.checkpoint.hf import export_hf
from lavit_dist.checkpoint.llama_state import WEIGHTS_FOLDER, read_facts
from lavit_dist.checkpoint.store import STEP, read_step, verify
from lavit_dist.checkpoint.weight_parts import WeightParts
from lavit_dist.errors import UserError, check
from lavit_dist.files import new_folder
from lavit_dist.observe.logs import setup_logging


def inspect(folder: str) -> None:
    """Prints what is in the step folder `folder`."""
    setup_logging()
    facts, step, weights = read_facts(Path(folder)), read_step(Path(folder)), WeightParts(Path(folder) / WEIGHTS_FOLDER)
    size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    rows = {
        "optimizer steps taken": f"{step.step:,}",
        "size": f"{size / 1e9:.3f} GB",
        "written by": f"{step.ranks} processes: {', '.join(f'{name} {value}' for name, value in facts.layout.items())}",
        "precision": facts.precision,
        "vocabulary": f"{facts.text_size:,} text ids, {facts.codebook_size:,} codes",
        "weights": f"{weights.count():,} numbers in {len(weights.names)} tensors",
        "rows trained on": ", ".join(f"{name} {state['rows_consumed']:,}" for name, state in facts.data["sources"].items()),
    }
    console = Console(highlight=False)
    for name, value in rows.items():
        console.print(Text(f"{name:<21} {value}"), soft_wrap=True)


def verify_steps(folder: str) -> bool:
    """Reads the step folder `folder`, or all of a run's, and prints which are whole; returns whether all are."""
    setup_logging()
    root = Path(folder)
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
