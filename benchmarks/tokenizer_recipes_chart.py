"""The curves of `tokenizer_recipes.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lavit_dist.observe.metrics import METRICS_FILE, read_lines
from lavit_dist.observe.report.charts import running_mean

COLOURS = ("#2563eb", "#94a3b8", "#dc2626", "#f59e0b", "#059669", "#a7f3d0")
PANELS = {
    "reconstruction_loss": "loss: 1 - cosine of features",
    "codes_used": "share of codes in use",
    "perplexity": "perplexity of a batch's codes",
    "keep_ratio": "share of patches kept",
}
WINDOW = 15
"""Steps that a curve is averaged over."""


def draw(runs: Mapping[str, Path], out: Path) -> None:
    """Writes one PNG with a panel per figure and a curve per run that reports it."""
    figure = Figure(figsize=(11, 6.4), layout="constrained", dpi=110)
    panels = figure.subplots(2, 2).flatten()
    for axes, (metric, title) in zip(panels, PANELS.items(), strict=True):
        for colour, (name, run_dir) in zip(COLOURS, runs.items(), strict=False):
            records = [json.loads(line) for line in read_lines(run_dir / METRICS_FILE)]
            points = np.array([(record["step"], record[metric]) for record in records if metric in record])
            if len(points) > WINDOW:
                axes.plot(points[WINDOW - 1 :, 0], running_mean(points[:, 1], WINDOW), color=colour, linewidth=1.8, label=name)
        axes.set_title(title, fontsize=11, loc="left", color="#334155")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e2e8f0")
        axes.set_axisbelow(True)
        axes.set_xlabel("step", color="#475569")
    panels[0].set_yscale("log")
    panels[1].set_ylim(0, 1.02)
    panels[0].legend(frameon=False, fontsize=9)
    figure.savefig(out)
