"""Telling what a benchmark found."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def tell(report: Iterable[str], output: Path | None) -> None:
    """Prints each line as soon as it is there; at the end all are written to `output`, if there is one."""
    lines = []
    for line in report:
        print(line, flush=True)
        lines.append(line)
    if output:
        output.write_text("\n".join(lines) + "\n")
