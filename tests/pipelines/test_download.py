"""Metadata becomes tars, by img2dataset from a web server that misbehaves; without img2dataset, by one that stands in for it."""

import json
import logging
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lavit_dist.config.base import build, save_config
from lavit_dist.config.download import DownloadConfig
from lavit_dist.data.download_scratch import DownloadScratch
from lavit_dist.data.downloaded_shard import read_record
from lavit_dist.data.img2dataset import PROGRAM
from lavit_dist.data.pair_sources import Columns, read_source
from lavit_dist.data.pairs import list_shards, read_pairs
from lavit_dist.data.quarantine import read_quarantine
from lavit_dist.engine.run_folder import hold
from lavit_dist.errors import UserError
from pipelines.download import download, make_downloader
from tests.pipelines.bad_web import KINDS, MAX_BYTES, MAX_PIXELS, WORTH_ANOTHER_TRY, serving

REASONS = {kind: reason for kind, reason in KINDS.items() if reason is not None}
REAL = Path(__file__).resolve().parents[2] / ".venv-img2dataset/bin/python"


@pytest.fixture(autouse=True)
def restored_logging():
    """The stage sets the process's logging up, which must not outlive a test."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    """The interpreter of an environment that has the stand-in as its img2dataset, and pyarrow and Pillow from ours."""
    root = tmp_path_factory.mktemp("stand-in")
    venv.create(root, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(root)}))
    paths = [Path(__file__).parent / "stand_in", sysconfig.get_path("purelib")]
    (packages / "stand_in.pth").write_text("\n".join(map(str, paths)))
    (packages / "img2dataset-1.47.0.dist-info").mkdir()
    (packages / "img2dataset-1.47.0.dist-info/METADATA").write_text("Name: img2dataset\nVersion: 1.47.0\n")
    return root / "bin/python"


@pytest.fixture(params=["stand-in", "img2dataset"])
def downloader(request, stand_in):
    if request.param == "img2dataset" and not REAL.exists():
        pytest.skip("img2dataset is not installed in .venv-img2dataset; `make downloader` does that")
    return stand_in if request.param == "stand-in" else REAL


@pytest.fixture
def web():
    with serving() as server:
        yield server


def write_metadata(path, urls, **columns):
    given = {"TEXT": [f"caption {number} " for number in range(len(urls))], "similarity": [0.25] * len(urls)} | columns
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"SAMPLE_ID": range(len(urls)), "URL": pa.array(urls, pa.string()), **given}), path)


def settings(tmp_path, python, **changes):
    values = {"metadata": str(tmp_path / "metadata"), "run_dir": str(tmp_path / "run"), "downloader_python": str(python)}
    values |= {"samples_per_shard": 20, "image_size": 64, "processes": 1, "threads": 20, "timeout": 1.0, "max_seconds": 1.0}
    values |= {"retries": 1, "retry_wait": 0, "max_bytes": MAX_BYTES, "max_pixels": MAX_PIXELS}
    return build(DownloadConfig, values | changes)


def outcomes(folder):
    """By row: the caption of each pair, and the reason of each row in quarantine; no row has both."""
    pairs = [(int(pair.key), pair.captions) for tar in sorted(folder.glob("*.tar")) for pair in read_pairs(tar)[0]]
    refused = [(int(record.key), record.reason) for path in folder.glob("*.quarantine.jsonl") for record in read_quarantine(path)]
    found = dict(pairs + refused)
    assert len(found) == len(pairs) + len(refused)
    return found


def test_every_row_ends_as_a_pair_or_with_its_reason(tmp_path, web, downloader):
    kinds = [*KINDS, "good"] * 2
    urls = [f"{web.address}/{kind}/{number}" for number, kind in enumerate(kinds)]
    urls += [None, "file:///etc/hostname", "ftp://127.0.0.1/x", f"{web.address}/good/caf\u00e9 1", f"{web.address}/good/silent"]
    expected = [REASONS.get(kind) for kind in kinds] + ["bad_url"] * 3 + [None, "empty_caption"]
    captions = [f"caption {number} " for number in range(len(urls) - 1)] + [" "]
    write_metadata(tmp_path / "metadata/part-0.parquet", urls[:25], TEXT=captions[:25], NSFW=["UNLIKELY"] * 25)
    write_metadata(tmp_path / "metadata/part-1.parquet", urls[25:], TEXT=captions[25:], NSFW=[None] * (len(urls) - 25))
    config = settings(tmp_path, downloader, samples_per_shard=len(kinds))
    download(config)

    run = tmp_path / "run"
    assert outcomes(run) == {
        row: reason or (captions[row].strip(),) for row, reason in enumerate(expected)
    }  # a pair has its own row's caption
    asked = Counter({f"/{kind}/{number}": 1 for number, kind in enumerate(kinds)} | {"/good/caf%C3%A9%201": 1})
    asked.update(f"/{kind}/{number}" for number, kind in enumerate(kinds) if kind in WORTH_ANOTHER_TRY or kind == "heals")
    assert {path: count for path, count in web.requests.items() if "/loop/" not in path} == {
        path: count for path, count in asked.items() if "/loop/" not in path
    }
    summary = json.loads((run / "summary.json").read_text())
    assert summary["quarantined"] == dict(Counter(filter(None, expected)))
    assert (summary["rows"], summary["pairs"], summary["shards"]) == (len(urls), expected.count(None), 2)
    names = {path.name for path in run.iterdir()}
    shards = {f"0000{shard}{ending}" for shard in (0, 1) for ending in (".tar", ".quarantine.jsonl", "_stats.json")}
    assert names == shards | {".lock", "config.yaml", "img2dataset.log", "metadata.json", "summary.json"}

    pairs = {int(pair.key): pair.metadata for tar in list_shards(run) for pair in read_pairs(tar)[0]}
    large, small = pairs[kinds.index("good")], pairs[kinds.index("small")]
    assert (large["width"], large["height"], large["original_width"], large["original_height"]) == (96, 64, 300, 200)
    assert (small["width"], small["height"]) == (40, 20)
    assert (large["similarity"], large["SAMPLE_ID"], large["NSFW"]) == (0.25, kinds.index("good"), "UNLIKELY")
    assert len(large["sha256"]) == 64
    assert len(read_source(run, Columns())[0]) == len(pairs)  # what ingest.py takes

    before, requests = {path: path.stat().st_mtime_ns for path in run.glob("*.tar")}, web.requests.total()
    download(config)
    assert web.requests.total() == requests
    (run / "00001.tar").write_bytes((run / "00001.tar").read_bytes()[:5000])
    download(config)
    assert web.requests.total() == requests + 1
    assert outcomes(run)[len(urls) - 2] == (captions[-2].strip(),)
    after = {path: path.stat().st_mtime_ns for path in run.glob("*.tar")}
    assert {path.name for path in before if before[path] != after[path]} == {"00001.tar"}


def test_a_killed_run_goes_on_where_it_was(tmp_path, web, downloader, repo_root):
    kinds = [*["good", "gone"] * 4, "slow", "good"] * 5
    write_metadata(tmp_path / "metadata/0.parquet", [f"{web.address}/{kind}/{number}" for number, kind in enumerate(kinds)])
    config = settings(tmp_path, downloader, samples_per_shard=10, retries=0, timeout=0.5)
    save_config(config, tmp_path / "download.yaml")
    process = subprocess.Popen([sys.executable, "data_prep/download.py", "--config", tmp_path / "download.yaml"], cwd=repo_root)
    scratch = tmp_path / "run/.download"
    wait_until(lambda: len(list(scratch.glob("attempt-*/out/*_stats.json"))) >= 2)
    process.kill()
    process.wait()
    wait_until(lambda: not any(str(tmp_path) in command for command in running()))
    before = web.requests.copy()
    download(config)
    assert outcomes(tmp_path / "run") == {row: REASONS.get(kind) or (f"caption {row}",) for row, kind in enumerate(kinds)}
    asked_again = [path for path in before if web.requests[path] != before[path] and "slow" not in path]
    assert len(asked_again) <= 9 * 3  # two of the five shards were finished
    assert not scratch.exists()


def test_a_row_that_stops_the_downloader_is_found_out_alone(tmp_path, web, stand_in):
    urls = [f"{web.address}/good/{number}" for number in range(20)]
    urls[13] = f"{web.address}/poison/13"
    write_metadata(tmp_path / "metadata/0.parquet", urls)
    download(settings(tmp_path, stand_in, samples_per_shard=10))
    assert outcomes(tmp_path / "run") == {row: (f"caption {row}",) for row in range(20)} | {13: "no_result"}


def test_a_downloader_that_stands_still_is_ended_and_one_whose_starter_is_gone_ends_itself(tmp_path, stand_in):
    scratch = DownloadScratch(tmp_path)
    attempt = scratch.start_attempt()
    scratch.add_input(attempt, 3, [30, 31], ["http://127.0.0.1:9/standstill"] * 2)
    downloader = replace(make_downloader(settings(tmp_path, stand_in), tmp_path), stall_timeout=0.6)
    assert downloader.run(attempt, 2) is None
    assert not any(str(attempt) in command for command in running())
    (attempt / "out").rmdir()
    process = subprocess.Popen([stand_in, "-I", PROGRAM, attempt / "job.json"], stdin=subprocess.PIPE, start_new_session=True)
    wait_until((attempt / "out").exists)
    process.stdin.close()
    assert process.wait(60) == -signal.SIGKILL


def test_finished_pieces_of_a_killed_run_are_taken_over_and_damaged_ones_are_not(tmp_path):
    out = tmp_path / "attempt-x/out"
    out.mkdir(parents=True)
    for number, rows in enumerate(([70, 71], [72])):
        table = {"row": rows, "shard": [7] * len(rows), "status": ["success"] * len(rows), "error_message": [None] * len(rows)}
        pq.write_table(pa.table(table), out / f"0000{number}.parquet")
        (out / f"0000{number}_stats.json").write_text("{}")
    (out / "00001.parquet").write_bytes(b"PAR1 cut")
    pq.write_table(pa.table({"row": [73]}), out / "00002.parquet")  # without the mark
    scratch = DownloadScratch(tmp_path)
    assert scratch.outcomes(7) == {70: ("success", None), 71: ("success", None)}
    assert not out.parent.exists()


@pytest.mark.parametrize("ending", [".tar", ".quarantine.jsonl", "_stats.json"])
def test_a_shard_that_lacks_a_file_is_no_shard(tmp_path, ending):
    for each, content in (
        (".tar", b"12"),
        (".quarantine.jsonl", b""),
        ("_stats.json", b'{"rows":1,"pairs":1,"tar_bytes":2,"quarantined":{}}'),
    ):
        (tmp_path / f"00000{each}").write_bytes(content)
    assert read_record(tmp_path, 0) is not None
    (tmp_path / f"00000{ending}").unlink()
    assert read_record(tmp_path, 0) is None
    assert not list(tmp_path.iterdir())


def test_a_network_that_is_down_is_no_verdict_on_the_rows(tmp_path, web, stand_in):
    address = web.address
    write_metadata(tmp_path / "metadata/0.parquet", [f"{address}/good/{number}" for number in range(120)])
    web.server_close()
    config = settings(tmp_path, stand_in, samples_per_shard=60)
    with pytest.raises(UserError, match=r"None of 120 addresses answered \(connection_failed 120\); see that this machine"):
        download(config)
    assert not list((tmp_path / "run").glob("*_stats.json"))


def test_mistakes_are_told_in_a_sentence(tmp_path, stand_in):
    metadata = tmp_path / "metadata/0.parquet"
    write_metadata(metadata, ["http://127.0.0.1:9/a"])
    refused = [
        ({"downloader_python": sys.executable}, r"has no img2dataset; make it with `make downloader`"),
        ({"downloader_python": "nowhere/python"}, r"nowhere/python can't be run .* `make downloader`"),
        ({"url_column": "url"}, r"url_column 'url' is not one column of .*; its columns are SAMPLE_ID, URL, TEXT, similarity"),
        ({"caption_column": "similarity"}, r"caption_column 'similarity' .* holds values of type double; name a column of text"),
        ({"columns": ["NSFW"]}, r"columns 'NSFW' is not one column of"),
        ({"metadata": str(tmp_path)}, r"names no Parquet file"),
        ({"metadata": "s3://bucket/meta"}, r"is an address; copy its files"),
        ({"metadata": __file__}, r"test_download.py can't be read as Parquet"),
        ({"run_dir": str(tmp_path)}, r"holds files that this program didn't make"),
        ({"stall_timeout": 0.5}, r"stall_timeout 0.5 must be above timeout 1.0"),
    ]
    for changes, sentence in refused:
        with pytest.raises(UserError, match=sentence):
            download(settings(tmp_path, stand_in, **changes))
    with hold(tmp_path / "run"), pytest.raises(UserError, match="Another run is at work"):
        download(settings(tmp_path, stand_in))
    with pytest.raises(UserError, match=r"None of the 1 rows of metadata gave a pair \(connection_failed 1\)"):
        download(settings(tmp_path, stand_in))
    with pytest.raises(UserError, match="belongs to a run with image_size = 64, but now image_size = 32"):
        download(settings(tmp_path, stand_in, image_size=32))
    write_metadata(metadata, ["http://127.0.0.1:9/a", "http://127.0.0.1:9/b"])
    with pytest.raises(UserError, match=r"The metadata is not that which .* was begun with: where it had .*'rows': 1"):
        download(settings(tmp_path, stand_in))


def running():
    """The command lines of all processes."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes().decode(errors="replace")
        except OSError:
            continue


def wait_until(true, seconds=60):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
