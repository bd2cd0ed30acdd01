"""What reading images costs: our two orders against webdataset's pipeline with the same decoding, in one process.

    python benchmarks/image_input.py --photos FOLDER [--images N] [--threads T]

Pictures of FOLDER, shrunk to 256 pixels as in LAION, are written into tars of 1,000 and read back as batches of 224 x 224 pixels. The
second figure is the processor time per image over all threads, which other work on the machine disturbs less than the first.
"""

import argparse
import io
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import webdataset
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lavit_dist.config.base import build
from lavit_dist.config.images import ImagesConfig
from lavit_dist.data.image import normalise, resize
from lavit_dist.data.image_batches import open_images
from lavit_dist.data.picture import decode_image

SIZE = 224
BATCH = 128
IMAGES_PER_TAR = 1000


def write_tars(photos: Path, folder: Path, images: int) -> None:
    """Tars of pictures and captions, the photographs in turn."""
    encoded = []
    for path in sorted(photos.rglob("*.jpg")):
        image = Image.open(path).convert("RGB")
        image.thumbnail((256, 256))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        encoded.append(buffer.getvalue())
    turns = itertools.cycle(encoded)
    for number in range(images // IMAGES_PER_TAR):
        with webdataset.TarWriter(str(folder / f"{number:05d}.tar")) as tar:
            for key in range(IMAGES_PER_TAR):
                tar.write({"__key__": f"{number:05d}{key:04d}", "jpg": next(turns), "txt": b"a photograph"})


def ours(folder: Path, order: str, threads: int) -> Iterator[Tensor]:
    config = build(
        ImagesConfig, {"shards": str(folder), "order": order, "streams": 4, "decode_threads": threads, "pixel_cache_bytes": 0}
    )
    batches = open_images(config, image_size=SIZE, global_batch_size=BATCH, seed=0, rank=0, world_size=1)
    try:
        while True:
            yield batches.next().pixel_values
    finally:
        batches.close()


def rival(folder: Path) -> Iterator[Tensor]:
    """webdataset as its documentation has it, with a shuffle buffer of 1,000, without worker processes."""
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0)
        .shuffle(1000)
        .map(lambda sample: resize(decode_image(sample["jpg"]), SIZE))
        .repeat()
    )
    samples = iter(dataset)
    while True:
        yield normalise(torch.stack(list(itertools.islice(samples, BATCH))))


def measure(batches: Iterator[Tensor], images: int) -> tuple[float, float]:
    """Images per second, and processor milliseconds per image, after a first batch that isn't counted."""
    next(batches)
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(images // BATCH):
        next(batches)
    count = images // BATCH * BATCH
    return count / (time.perf_counter() - wall), (time.process_time() - processor) / count * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description="Images per second out of tars.")
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--images", type=int, default=8 * IMAGES_PER_TAR)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("reader", "images/s", "processor ms per image", "images/s against webdataset")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tars(arguments.photos, folder, arguments.images)
        readers: dict[str, Callable[[], Iterator[Tensor]]] = {
            "webdataset, one process": lambda: rival(folder),
            f"streamed, {arguments.threads} threads": lambda: ours(folder, "streamed", arguments.threads),
            f"indexed, {arguments.threads} threads": lambda: ours(folder, "indexed", arguments.threads),
        }
        base = None
        for reader, start in readers.items():
            speed, cost = measure(start(), arguments.images)
            base = base or speed
            table.add_row(reader, f"{speed:.0f}", f"{cost:.2f}", f"{speed / base:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
