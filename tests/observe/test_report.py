"""The report: one file that needs no other, shows what a run has and leaves out what it doesn't."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from lavit_dist.config.report import ReportConfig
from lavit_dist.errors import UserError
from lavit_dist.observe.report.charts import (
    histogram,
    histogram_figure,
    line_chart,
    running_mean,
    spread_chart,
    usage_chart,
    zipf_figure,
)
from lavit_dist.observe.report.page import Page, Shown, render
from lavit_dist.observe.stage_records import StageRecord, read_stage_records, write_stage_records
from pipelines.report import run

SECTIONS = {"scores", "pictures", "captions", "reconstructions", "patches", "tokens", "training", "time", "settings"}


class Links(HTMLParser):
    """Every address that a page names, and that its tags nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.anchors: set[str] = set()
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe")
        for name, value in attributes:
            if name in ("src", "href"):
                self.addresses.append(value or "")
            if name == "id":
                self.anchors.add(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse_svg(uri: str) -> ElementTree.Element:
    kind, _, content = uri.partition(",")
    assert kind == "data:image/svg+xml;base64"
    return ElementTree.fromstring(base64.b64decode(content))


def make_run(root: Path, *, with_truth: bool) -> None:
    """The folder of a chain that has run, with pictures of noise."""
    names = [f"{index:04d}" for index in range(3)]
    generator = np.random.default_rng(0)
    for kind in ("original", "text_to_image", "reconstruction"):
        (root / "evaluation" / kind).mkdir(parents=True)
        for name in names:
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "evaluation" / kind / f"{name}.png")
    np.savez(root / "evaluation" / "keep_masks.npz", **{name: np.array([True, False, True, False]) for name in names})
    verdict = {"right": False, "seen": {"colour": "red", "shape": "square"}} if with_truth else {}
    shares = {"colour": 0.9, "shape": 0.8, "all": 0.75}
    tokens = {"images": 3, "keep_ratio": 0.5, "tokens_mean": 2.0, "tokens_std": 0.0, "histogram": [0, 0, 3, 0, 0]}
    of_captions = {**shares, "position": 0.5, "position_stated": 2, "count": 1.0, "count_stated": 1}
    results = {
        "repetitions": {"num_tokenizations": 4, "num_candidates": 2, "num_paintings": 1},
        "captions": [{"name": name, "captions": ["a <b>"], "generated": "a & c", "tokens": 2, **verdict} for name in names],
        "text_to_image": [{"name": name, "prompt": "<script>alert(1)</script>", **verdict} for name in names],
        "reconstruction": [{"name": name, "tokens": 2, **verdict} for name in names],
        "tokens": {"train": tokens, "heldout": tokens},
        "codes": {"used": 0.5, "perplexity": 1.9, "counts": [4, 2, 0, 0]},
        "scores": {
            "captions": of_captions,
            "single": {"captions": of_captions, "text_to_image": shares, "reconstruction": shares},
            "probe": shares,
            "text_to_image": shares,
            "reconstruction": shares,
            "features": shares,
            "tokens_and_objects": 0.6,
            "tokens_by_objects": {"1": [0, 0, 3, 0, 0], "2": [0, 0, 0, 2, 1]},
        }
        if with_truth
        else None,
    }
    (root / "evaluation" / "results.json").write_text(json.dumps(results))
    (root / "tower").mkdir()
    (root / "tower" / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": 1 / s}) + "\n" for s in range(1, 30)))
    (root / "tower" / "config.yaml").write_text("total_steps: 29\n")
    write_stage_records(root, {"tower": StageRecord("vision tower", "python launcher/train_tower.py").after(65.2, 10**9)})


@pytest.mark.parametrize("with_truth", [True, False])
def test_the_whole_page_needs_nothing_outside_itself(tmp_path: Path, with_truth: bool) -> None:
    make_run(tmp_path, with_truth=with_truth)
    run(ReportConfig(run_dir=str(tmp_path)))
    page = (tmp_path / "report.html").read_text()
    links = Links(page)
    assert links.anchors >= SECTIONS
    assert all(address.startswith(("data:image/", "#")) for address in links.addresses)
    assert {address[1:] for address in links.addresses if address.startswith("#")} <= links.anchors
    assert "url(" not in page
    assert "&lt;script&gt;" in page
    assert ("seen: red square" in page) == with_truth
    assert ("Captions: colour and shape of the main object right" in page) == with_truth
    assert ("best of 4 tokenizations" in page) == with_truth
    assert "best of 1 paintings" not in page
    assert "1:05" in page
    assert "Share of patches kept" in page


def test_what_did_not_run_is_left_out(tmp_path: Path) -> None:
    run(ReportConfig(run_dir=str(tmp_path)))
    assert Links((tmp_path / "report.html").read_text()).anchors == set()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a folder"):
        run(ReportConfig(run_dir=str(tmp_path / "nowhere")))


def test_a_verdict_is_shown_where_there_is_one() -> None:
    def marks(right: bool | None) -> int:
        return len(
            re.findall("[✓✗]", render(Page(title="t", summary="s", captions=[Shown("data:image/png;base64,", "w", right=right)])))
        )

    assert (marks(True), marks(False), marks(None)) == (1, 1, 0)


@pytest.mark.parametrize("largest", [0, 299, 300, 7001])
def test_no_number_is_lost_where_neighbours_share_a_bar(largest: int) -> None:
    counts = np.random.default_rng(0).integers(1, 9, largest + 1)
    bars = histogram_figure(counts.tolist(), x="tokens", y="documents").axes[0].patches
    assert sum(bar.get_height() for bar in bars) == counts.sum()
    assert len(bars) <= 300


def test_a_law_of_ranks_is_drawn_through_the_counts() -> None:
    counts, law = (line.get_ydata() for line in zipf_figure([0, 300, 1200, 600, 400], 1.0, x="rank", y="times").axes[0].lines)
    assert list(counts) == [1200, 600, 400, 300]
    assert list(law) == pytest.approx([1200, 600, 400, 300])
    assert len(zipf_figure([7], None, x="rank", y="times").axes[0].lines) == 1


def test_every_chart_draws_extreme_values() -> None:
    for uri in (
        line_chart({"flat": ([1, 2, 3], [0.0, 0.0, 0.0])}, x="step", y=""),
        line_chart({"a": ([1, 2], [1e9, 1e-9]), "b": ([2, 3], [0.5, 0.4])}, x="step", y=""),
        histogram([0, 0, 5], x="tokens", y="images"),
        spread_chart({1: [0, 0, 3], 4: [1, 1, 1]}, x="objects", y="tokens"),
        usage_chart([0, 7, 1], x="codes", y="uses"),
        usage_chart([3, 3, 3], x="codes", y="uses"),
    ):
        assert parse_svg(uri).tag.endswith("svg")


def test_a_running_mean_is_the_mean_of_each_window() -> None:
    assert running_mean([1, 2, 3, 6], 2).tolist() == [1.5, 2.5, 4.5]
    assert running_mean([1, 2, 3], 1).tolist() == [1, 2, 3]


def test_attempts_of_a_stage_add_up(tmp_path: Path) -> None:
    record = StageRecord("vision tower", "python …").after(10, 5).after(3, 2)
    assert (record.seconds, record.peak_memory) == (13, 5)
    write_stage_records(tmp_path, {"tower": record})
    assert read_stage_records(tmp_path) == {"tower": record}
    assert read_stage_records(tmp_path / "other") == {}
