"""docs/layouts.md: how far each setting's steps were from those of one process."""

from __future__ import annotations

import importlib.metadata
from collections import defaultdict
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import NamedTuple

from tests.distributed.settings import Setting

LIBRARIES = ("torch", "megatron-core", "deepspeed")


class Difference(NamedTuple):
    """The largest relative difference over all steps."""

    loss: float
    norm: float


def render(differences: Mapping[Setting, Difference], notes: str) -> str:
    """The page: `notes`, then a row per layout, ZeRO stage and sequence parallelism, and a column per what else was varied."""
    rows: dict[tuple[str, ...], dict[str, Difference]] = defaultdict(dict)
    for setting, difference in differences.items():
        sizes = (setting.tensor, setting.pipeline, setting.data, setting.zero, "yes" if setting.sequence_parallel else "no")
        rows[tuple(map(str, sizes))][_column(setting)] = difference
    columns = list(dict.fromkeys(_column(setting) for setting in differences))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    worst = {
        precision: Difference(*(max(values) for values in zip(*kind, strict=True)))
        for precision in ("fp32", "bf16")
        if (kind := [difference for setting, difference in differences.items() if setting.precision == precision])
    }
    summary = "; ".join(f"{precision}: loss {d.loss:.1e}, norm {d.norm:.1e}" for precision, d in worst.items())
    head = ["tensor", "pipeline", "data", "ZeRO", "sequence parallel", *columns]
    lines = [
        notes.rstrip(),
        "",
        f"{datetime.now(timezone.utc):%Y-%m-%d}, {versions}, gloo on CPU. {len(differences)} settings. Worst of all: {summary}.",
        "",
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
    ]
    for place in sorted(rows, key=lambda row: (int(row[0]) * int(row[1]) * int(row[2]), row)):
        cells = [f"{d.loss:.0e} / {d.norm:.0e}" if (d := rows[place].get(column)) else "" for column in columns]
        lines.append(f"| {' | '.join([*place, *cells])} |")
    return "\n".join(lines) + "\n"


def _column(setting: Setting) -> str:
    if setting.precision == "bf16":
        return "bf16"
    if setting.gather_twice:
        return "gathered twice"
    if setting.compiled:
        return "compiled"
    if setting.offload:
        return f"offload {setting.offload}"
    if setting.rows != "packed":
        return setting.rows
    return {"none": "plain", "selective": "selective recomputation", "full": "full recomputation"}[setting.checkpointing]
