"""The report: what the stages left in RUN_DIR becomes RUN_DIR/report.html, one file that needs no other."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lavit_dist import __version__
from lavit_dist.config.report import ReportConfig
from lavit_dist.errors import check
from lavit_dist.files import read_json, write_atomically
from lavit_dist.generation.contact_sheet import dim_dropped
from lavit_dist.observe.logs import setup_logging
from lavit_dist.observe.metrics import METRICS_FILE, read_lines
from lavit_dist.observe.report.charts import histogram, line_chart, spread_chart, usage_chart
from lavit_dist.observe.report.page import Chart, Page, Settings, Shown, StageRow, picture_uri, render
from lavit_dist.observe.stage_records import clock, gigabytes, read_stage_records
from pipelines.report_scores import score_rows, scores_note

logger = logging.getLogger(__name__)
REPORT = "report.html"
FOLDERS = ("pairs", "text_tokenizer", "tower", "tokenizer", "ids", "pretrain", "decoder", "evaluation")
"""Where the stages put what they make, in their order."""
CURVES = {
    "tower": {"Vision tower: contrastive loss": {"loss": "loss"}},
    "tokenizer": {
        "Visual tokenizer: loss": {"reconstruction_loss": "features (1 - cosine)"},
        "Visual tokenizer: share of patches kept": {"keep_ratio": "kept"},
    },
    "pretrain": {"Language model: cross-entropy per token": {"text_loss": "text", "image_loss": "image"}},
    "decoder": {"Decoder: weighted squared error of what it predicts": {"loss": "loss"}},
}
"""Charts of each training stage: title, and per metric the name of its curve."""


def run(config: ReportConfig) -> None:
    """Renders the report from what is there; a stage that hasn't run is left out."""
    setup_logging()
    root = Path(config.run_dir)
    check(root.is_dir(), f"run_dir {root} is not a folder; name the folder of a quickstart.")
    write_atomically(root / REPORT, render(collect(root, config.num_shown)).encode())
    logger.info("wrote %s", root / REPORT)


def collect(root: Path, num_shown: int) -> Page:
    """Everything that the folder of a chain has to show."""
    records = read_stage_records(root)
    total, peak = sum(record.seconds for record in records.values()), max((r.peak_memory for r in records.values()), default=0)
    rows = [StageRow(r.title, clock(r.seconds), gigabytes(r.peak_memory), r.command) for r in records.values()]
    results_file = root / "evaluation" / "results.json"
    results = read_json(results_file, "remove it and evaluate again") if results_file.exists() else None
    return Page(
        title="LaVIT, from pairs to pictures",
        summary=f"{root.resolve().name}: {len(rows)} stages in {clock(total)}, at most {gigabytes(peak)} of memory in all processes"
        f" together. lavit_dist {__version__}, torch {torch.__version__}.",
        training=list(_curves(root)),
        stages=[*rows, StageRow("in all", clock(total), gigabytes(peak), "")] if rows else [],
        settings=[Settings(name, path.read_text()) for name in FOLDERS if (path := root / name / "config.yaml").exists()],
        **(_evaluation(results, results_file.parent, num_shown) if results else {}),
    )


def _curves(root: Path) -> Iterator[Chart]:
    for stage, charts in CURVES.items():
        records = [json.loads(line) for line in read_lines(root / stage / METRICS_FILE)]
        for title, names in charts.items():
            series = {name: _series(records, metric) for metric, name in names.items()}
            series = {name: values for name, values in series.items() if len(values[0]) > 1}
            if series:
                yield Chart(line_chart(series, x="step", y=""), title)


def _series(records: list[dict[str, float]], metric: str) -> tuple[list[float], list[float]]:
    of_metric = [record for record in records if metric in record]
    return [record["step"] for record in of_metric], [record[metric] for record in of_metric]


def _evaluation(results: Mapping[str, Any], folder: Path, num_shown: int) -> dict[str, Any]:
    """The parts of the page that the evaluation fills."""
    masks = np.load(folder / "keep_masks.npz")

    def picture(kind: str, entry: Mapping[str, Any]) -> str:
        return picture_uri(Image.open(folder / kind / f"{entry['name']}.png"))

    def kept(entry: Mapping[str, Any]) -> Shown:
        mask = torch.from_numpy(masks[entry["name"]])
        original = Image.open(folder / "original" / f"{entry['name']}.png")
        return Shown(picture_uri(dim_dropped(original, mask)), f"{int(mask.sum())} of {len(mask)} patches")

    captions, drawn, rebuilt = (results[name][:num_shown] for name in ("captions", "text_to_image", "reconstruction"))
    return {
        "scores_note": scores_note(results),
        "scores": score_rows(results),
        "pictures": [
            Shown(picture("text_to_image", entry), entry["prompt"], seen=_seen(entry), right=entry.get("right")) for entry in drawn
        ],
        "captions": [
            Shown(picture("original", entry), entry["generated"], truth=entry["captions"][0], right=entry.get("right"))
            for entry in captions
        ],
        "reconstructions": [
            Shown(
                picture("original", entry),
                f"{entry['tokens']} tokens",
                beside=picture("reconstruction", entry),
                seen=_seen(entry),
                right=entry.get("right"),
            )
            for entry in rebuilt
        ],
        "patches": [kept(entry) for entry in rebuilt],
        "tokens": list(_token_charts(results)),
    }


def _seen(entry: Mapping[str, Any]) -> str:
    """What the judge names in a picture that it finds wrong."""
    return "" if entry.get("right", True) else " ".join(entry["seen"].values())


def _token_charts(results: Mapping[str, Any]) -> Iterator[Chart]:
    tokens = results["tokens"].get("heldout") or results["tokens"]["train"]
    yield Chart(histogram(tokens["histogram"], x="tokens", y="images"), f"Tokens of {tokens['images']} held-out images")
    if scores := results["scores"]:
        groups = scores["tokens_by_objects"]
        chart = spread_chart({int(objects): counts for objects, counts in groups.items()}, x="objects in the image", y="tokens")
        yield Chart(chart, "Tokens by number of objects")
    counts = results["codes"]["counts"]
    yield Chart(usage_chart(counts, x="codes, most used first", y="uses"), f"Use of the {len(counts)} codes on the training images")
