"""Statistics of id sets, beside a plain count of the documents, and known laws."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lavit_dist.config.id_cache import IdCacheConfig
from lavit_dist.data.id_shard import IMAGE
from lavit_dist.data.id_shards import IdShards
from lavit_dist.evaluation.id_set_stats import describe_lengths, fit_zipf, gather_stats
from lavit_dist.observe.job_progress import read_throughput
from tests.data.id_sets import Tar, sets, write_set, write_texts


@given(sets)
@settings(max_examples=15)
def test_counts_are_those_of_the_documents_one_by_one(shards):
    with TemporaryDirectory() as folder:
        manifest = write_set(Path(folder) / "ids", shards)
        gathered = gather_stats(manifest, IdCacheConfig())
        images: dict[tuple, list[int]] = {}
        texts, document_codes, lengths = [], 0, []
        for shard in IdShards(manifest):
            sources = zip(shard.column("source_shard"), shard.column("source_offset"), strict=True)
            for document, source in enumerate(sources):
                (_, codes), (_, text) = sorted(shard.segments(document), key=lambda segment: segment[0] != IMAGE)
                images[source] = codes.tolist()
                texts.append(len(text))
                document_codes += len(codes)
                lengths.append(len(codes) + len(text) + 3)  # [IMG], [/IMG], EOS
    codes = Counter(code for of_image in images.values() for code in of_image)
    assert {code: int(count) for code, count in enumerate(gathered.code_counts) if count} == codes
    assert gathered.text_lengths.tolist() == np.bincount(texts).tolist()
    assert gathered.image_lengths.tolist() == np.bincount([len(of_image) for of_image in images.values()]).tolist()
    assert gathered.document_lengths.tolist() == np.bincount(lengths).tolist()
    values = gathered.to_dict()
    assert values["tokens"] == {"text": sum(texts), "image": document_codes, "marks": 3 * len(texts), "all": sum(lengths)}
    assert (values["documents"], values["images"], values["codes"]["in_use"]) == (len(texts), len(images), len(codes))
    assert values["outcomes"]["used"] == len(images)
    assert json.loads(json.dumps(values)) == values


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60))
def test_a_histogram_tells_what_the_lengths_would(lengths):
    told = describe_lengths(np.bincount(lengths))
    assert told["number"] == len(lengths) and told["mean"] == pytest.approx(np.mean(lengths))
    assert (told["min"], told["max"]) == (min(lengths), max(lengths))
    for share in (5, 50, 99):
        assert told[f"p{share}"] == np.percentile(lengths, share, method="inverted_cdf")


@given(st.floats(0.2, 2), st.permutations(range(200)))
@settings(max_examples=10)
def test_the_exponent_of_a_power_law_is_found(exponent, order):
    counts = np.round(1e9 * np.arange(1, 201.0) ** -exponent).astype(np.int64)
    assert fit_zipf(np.concatenate([counts[list(order)], np.zeros(50, np.int64)])) == pytest.approx(exponent, abs=1e-3)


def test_codes_used_alike_have_exponent_0_and_a_single_one_none():
    assert fit_zipf(np.full(9, 5)) == pytest.approx(0, abs=1e-9)
    assert fit_zipf(np.array([0, 5, 0])) is None


def test_images_per_second_are_those_of_all_starts(tmp_path):
    manifest = write_set(tmp_path / "train", [[Tar([1])]])
    assert read_throughput(manifest, {}) is None
    reports = [
        {"seconds": 10.0, "images": 0, "images_per_second": 10.0, "device_busy": 0.9},
        {"seconds": 20.0, "images": 300, "images_per_second": 20.0, "device_busy": 0.9},
        {"seconds": 10.0, "images": 500, "images_per_second": 50.0, "device_busy": 0.9},  # another start, long after
        {"seconds": 20.0, "images": 500, "images_per_second": 0.0, "device_busy": 0.0},
    ]
    lines = "".join(json.dumps(report) + "\n" for report in reports) + '{"seconds": 50'
    (tmp_path / "progress.jsonl").write_text(lines)
    assert read_throughput(manifest, {}) == pytest.approx((300 + 500) / (20 + 20))
    assert gather_stats(manifest, IdCacheConfig()).to_dict()["images_per_second"] == pytest.approx(20)
    (tmp_path / "progress.jsonl").write_text("")
    assert read_throughput(manifest, {}) is None


def test_texts_alone_have_no_codes(tmp_path):
    values = gather_stats(write_texts(tmp_path / "ids", 7), IdCacheConfig()).to_dict()
    assert "codes" not in values and values["lengths"]["image"] == {"number": 0}
    assert values["tokens"] == {"text": 7, "image": 0, "marks": 7, "all": 14}
