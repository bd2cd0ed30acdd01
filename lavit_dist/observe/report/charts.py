"""The report's charts, as data URIs of SVG images."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

COLOURS = ("#2563eb", "#ea580c", "#059669")
GREY = "#94a3b8"
WIDTH, HEIGHT = 5.2, 2.7
"""Inches at 72 points each: legible at the width of a phone."""
MAX_BARS = 300
"""Of a histogram; where there are more numbers, neighbours share a bar."""
SMOOTHING = 20
"""Share of a curve, 1/20, over which its smoothed line averages."""


def line_chart(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, x: str, y: str) -> str:
    """Curves by name, each (x values, y values): every point faint, a running mean on top."""
    figure, axes = _axes(x, y)
    for colour, (name, (steps, values)) in zip(COLOURS, series.items(), strict=False):
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        window = max(1, len(values) // SMOOTHING)
        axes.plot(steps[window - 1 :], running_mean(values, window), color=colour, linewidth=1.8, label=name)
    shown = np.concatenate([np.asarray(values)[len(values) // 50 :] for _, values in series.values()])
    low, high = float(shown.min()), float(shown.max())
    axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) or low + 1)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=9)
    return _uri(figure)


def histogram(counts: Sequence[int], *, x: str, y: str) -> str:
    """`histogram_figure` as a data URI."""
    return _uri(histogram_figure(counts, x=x, y=y))


def histogram_figure(counts: Sequence[int], *, x: str, y: str) -> Figure:
    """How often each whole number from 0 occurs; a line marks the mean."""
    figure, axes = _axes(x, y)
    occurring = np.flatnonzero(counts)
    first, last = int(occurring[0]), int(occurring[-1]) + 1
    width = -(-(last - first) // MAX_BARS)
    starts = np.arange(first, last, width)
    bars = np.add.reduceat(np.asarray(counts[:last]), starts)
    axes.bar(starts + (width - 1) / 2, bars, color=COLOURS[0], width=0.9 * width)
    axes.set_ylim(0, 1.15 * bars.max())  # room for the words at the line
    mean = float(np.average(np.arange(len(counts)), weights=counts))
    axes.axvline(mean, color=COLOURS[1], linewidth=1.5)
    axes.annotate(f"mean {mean:.1f}", (mean, axes.get_ylim()[1]), color=COLOURS[1], xytext=(5, -10), textcoords="offset points")
    return figure


def spread_chart(groups: Mapping[int, Sequence[int]], *, x: str, y: str) -> str:
    """Per group, on the x axis, the spread of whole numbers, given as how often each from 0 occurs; a line joins the means."""
    figure, axes = _axes(x, y)
    values = {position: np.repeat(np.arange(len(counts)), counts) for position, counts in sorted(groups.items())}
    axes.boxplot(
        list(values.values()),
        positions=list(values),
        widths=0.5,
        showfliers=False,
        patch_artist=True,
        boxprops={"facecolor": "#dbeafe", "edgecolor": COLOURS[0]},
        medianprops={"color": COLOURS[0]},
        whiskerprops={"color": COLOURS[0]},
        capprops={"color": COLOURS[0]},
    )
    axes.plot(list(values), [of_group.mean() for of_group in values.values()], color=COLOURS[1], marker="o", markersize=4)
    axes.set_xticks(list(values), [str(position) for position in values])
    return _uri(figure)


def usage_chart(counts: Sequence[int], *, x: str, y: str) -> str:
    """`usage_figure` as a data URI."""
    return _uri(usage_figure(counts, x=x, y=y))


def usage_figure(counts: Sequence[int], *, x: str, y: str) -> Figure:
    """Counts from the largest to the smallest, on a logarithmic axis; what was never used is marked."""
    figure, axes = _axes(x, y)
    ordered = np.sort(np.asarray(counts))[::-1]
    used = int((ordered > 0).sum())
    axes.fill_between(range(used), ordered[:used], 0.5, color=COLOURS[0], alpha=0.25, step="mid")
    axes.plot(range(used), ordered[:used], color=COLOURS[0], drawstyle="steps-mid")
    axes.set_yscale("log")
    axes.set_xlim(0, len(ordered))
    axes.set_ylim(0.5)
    if used < len(ordered):
        axes.axvspan(used, len(ordered), color=GREY, alpha=0.2, linewidth=0)
        axes.annotate("never", ((used + len(ordered)) / 2, 0.6), color="#475569", ha="center")
    return figure


def zipf_figure(counts: Sequence[int], exponent: float | None, *, x: str, y: str) -> Figure:
    """Counts against their ranks, both logarithmic; `exponent` draws rank^-exponent through their middle, weighted by 1 / rank."""
    figure, axes = _axes(x, y)
    ordered = np.sort(np.asarray(counts))[::-1]
    ordered = ordered[ordered > 0]
    ranks = np.arange(1, len(ordered) + 1)
    axes.loglog(ranks, ordered, color=COLOURS[0], marker=".", markersize=4, linewidth=1)
    if exponent is not None:
        middle = np.average(np.log(ordered) + exponent * np.log(ranks), weights=1 / ranks)
        axes.loglog(
            ranks,
            np.exp(middle) * ranks**-exponent,
            color=COLOURS[1],
            linestyle="--",
            linewidth=1.2,
            label=f"rank$^{{{-exponent:.2f}}}$",
        )
        axes.legend(frameon=False, fontsize=9)
    return figure


def running_mean(values: Sequence[float], window: int) -> Any:
    """The mean of each `window` consecutive values."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=float))])
    return (sums[window:] - sums[:-window]) / window


def _axes(x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x, color="#475569")
    axes.set_ylabel(y, color="#475569")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#cbd5e1")
    axes.tick_params(colors="#475569", labelsize=9)
    axes.grid(axis="y", color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
