"""Proof of a port or a conversion: a folder of reference vectors, compared tensor by tensor."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lavit_dist.checkpoint.reference import is_reference_folder
from lavit_dist.errors import check
from lavit_dist.evaluation.reference_check import ReferenceCheck, check_reference


def reference(folder: str) -> bool:
    """Prints a table of differences from the reference in `folder`; returns whether there are none that matter."""
    check(
        is_reference_folder(Path(folder)),
        f"{folder} is no folder of reference vectors: it has neither vectors.safetensors nor visual_tokenizer/; name one that has.",
    )
    result = check_reference(Path(folder))
    _print(result, folder)
    return result.ok


def _print(result: ReferenceCheck, folder: str) -> None:
    console = Console(highlight=False)
    table = Table(box=None, header_style="bold")
    for title in ("tensor or file", "reference", "difference", "limit", ""):
        table.add_column(title, overflow="fold", no_wrap=title != "difference")
    for row in result.rows:
        verdict = Text("ok", "green") if row.ok else Text("FAIL", "bold red")
        table.add_row(*(Text(cell) for cell in (row.name, row.reference, row.measured, row.limit)), verdict)
    console.print(table)
    for note in result.notes:
        console.print(Text(f"note: {note}"))
    failed = sum(not row.ok for row in result.rows)
    console.print(Text(f"{folder}: {'reproduced' if result.ok else f'{failed} of {len(result.rows)} rows FAIL'}", "bold"))
