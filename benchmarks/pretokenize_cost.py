"""What 400 million images cost to tokenize with the released tokenizer: device hours, days, CPU cores and storage.

    python benchmarks/pretokenize_cost.py [--utilisation 0.5 --kept 90 --output benchmarks/pretokenize_cost.md]

Device time is the FLOP count of one image at a stated share of the device's peak: a calculation, not a measurement, as long as no GPU was at
hand. CPU time (reading, decoding and squashing a 256 px JPEG, encoding its caption) and bytes per document are measured here.
"""

import argparse
import datetime
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pretokenize_world import write_tars, write_tokenizers
from tables import tell
from tokenizer_inference import flops_per_image

from lavit_dist.config.images import MAX_PIXELS
from lavit_dist.config.model import VisualTokenizerConfig
from lavit_dist.data.id_shard import IMAGE, TEXT, Encoding, IdDocument
from lavit_dist.data.id_shard_writer import write_id_shard
from lavit_dist.data.pair_decoder import PairDecoder
from lavit_dist.data.pair_reader import PairReader
from lavit_dist.data.shard_list import Shard
from lavit_dist.engine.throughput import PEAK_FLOPS

IMAGES = 400_000_000
DEVICES = (1, 8, 32, 64)
PAIRS = 400
CAPTION_IDS = 18
"""Text ids per caption of LAION-400M, on average."""


def cpu_seconds(folder: Path) -> float:
    """Processor time of everything that a decoder does for one pair."""
    write_tars(folder / "pairs", 1, PAIRS, 256)
    write_tokenizers(folder, width=32, layers=1, image_size=28, patch_size=14)
    reader = PairReader(PairDecoder(str(folder / "text"), 224, MAX_PIXELS, {}), 1)
    tar = folder / "pairs/00000.tar"
    reader.decode((opened := reader.open(Shard(tar.name, str(tar), None), 0)).place, opened.samples[:8])
    start = time.process_time()
    opened = reader.open(Shard(tar.name, str(tar), None), 0)
    assert len(reader.decode(opened.place, opened.samples).pairs) == PAIRS
    return (time.process_time() - start) / PAIRS


def bytes_per_document(folder: Path, kept: float) -> float:
    """Of a shard with as many codes and text ids as LAION's pairs have."""
    random = np.random.default_rng(0)
    encoding = Encoding("v", "t", "p", "s", 32_000, 16_384)
    documents = []
    for number in range(5000):
        codes = random.integers(16_384, size=max(1, random.poisson(kept))).tolist()
        text = random.integers(32_000, size=max(1, random.poisson(CAPTION_IDS))).tolist()
        caption = "x" * (4 * len(text))
        source = ("00000.tar", 25_000 * number, 24_000)
        segments = ((IMAGE, codes), (TEXT, text))
        documents.append(
            IdDocument(f"{number:09d}", 0, segments, bytes(32), caption, source, {"similarity": 0.31, "width": 256, "height": 256})
        )
    return write_id_shard(folder / "shard.arrow", documents, encoding=encoding, inputs=()).size / len(documents)


def report(arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    """The lines of the report."""
    flops = sum(flops_per_image(VisualTokenizerConfig(), arguments.kept)[:1])
    rate = arguments.utilisation * PEAK_FLOPS["H200"] / flops
    cpu = cpu_seconds(folder)
    size = bytes_per_document(folder, arguments.kept)
    yield f"# {IMAGES // 10**6} million images, {datetime.datetime.now(tz=datetime.timezone.utc):%d %B %Y}"
    yield ""
    yield f"{flops / 1e12:.2f} TFLOP per image ({arguments.kept:g} patches kept), {arguments.utilisation:.0%} of an H200's {PEAK_FLOPS['H200'] / 1e12:.0f} TFLOP/s in bf16: {rate:.0f} images/s per device,"
    yield f"calculated, not measured on GPU. Measured on one of {len(os.sched_getaffinity(0))} CPU cores: {1000 * cpu:.1f} ms per pair to decode, so {rate * cpu:.1f} cores per device; {size:.0f} bytes"
    yield f"per document, {size * IMAGES / 1e9:.0f} GB in all. Made by `benchmarks/pretokenize_cost.py`."
    yield ""
    yield "| H200s | images/s | device hours | wall time | CPU cores that decode | tars read, GB/s (25 kB per pair) | id shards |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for devices in DEVICES:
        hours = IMAGES / rate / 3600
        wall = hours / devices
        yield (
            f"| {devices} | {rate * devices:,.0f} | {hours:.0f} | {wall / 24:.1f} days | {rate * cpu * devices:.0f} | {rate * devices * 25e3 / 1e9:.2f}"
            f" | {size * IMAGES / 1e9:.0f} GB |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utilisation", type=float, default=0.5)
    parser.add_argument("--kept", type=float, default=90)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tell(report(arguments, Path(folder)), arguments.output)


if __name__ == "__main__":
    main()
