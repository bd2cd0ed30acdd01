"""What the benchmarks of pretokenization work on: tars of pictures, tokenizers with random weights, and the job as a program."""

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from lavit_dist.checkpoint.official import save_visual_tokenizer
from lavit_dist.config.model import CodebookConfig, MergerConfig, TokenizerDecoderConfig, VisionEncoderConfig, VisualTokenizerConfig
from lavit_dist.data.hashing import stable_fraction
from lavit_dist.data.text_tokenizer import train_text_tokenizer
from lavit_dist.models.initialisation import initialise
from lavit_dist.models.visual_tokenizer import VisualTokenizer

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "data_prep" / "pretokenize.py"


def write_tars(folder: Path, tars: int, pairs_per_tar: int, side: int, seed: int = 0) -> None:
    """Tars of blurred noise with a caption each: JPEG files about as large as photographs of `side` pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    pictures = [_picture(random, side) for _ in range(min(64, pairs_per_tar))]
    for number in range(tars):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for index in range(pairs_per_tar):
                key = f"{number:05d}{index:05d}"
                caption = f"picture {index} of tar {number} is blurred in {random.integers(99)} ways".encode()
                for name, data in sample(key, pictures[(number + index) % len(pictures)], caption):
                    _add(tar, name, data)


def add_defects(folder: Path) -> None:
    """Appends to each tar samples of every defect that LAION's tars were seen to have, and gives good ones a similarity from 0 to 1."""
    bomb = zlib.compress(bytes(1 << 16), 9)
    for number, path in enumerate(sorted(folder.glob("*.tar"))):
        with tarfile.open(path) as tar:
            keys = sorted({member.name.partition(".")[0] for member in tar})
            picture = tar.extractfile(f"{keys[0]}.jpg")
            data = picture.read() if picture else b""
        bad: list[tuple[str, bytes]] = [
            *((f"{key}.json", json.dumps({"similarity": stable_fraction(key)}).encode()) for key in keys),
            *sample(f"{number}page", b"<!DOCTYPE html><html>404</html>"),
            *sample(f"{number}cut", data[: len(data) // 2]),
            *sample(f"{number}empty", b""),
            *sample(f"{number}bomb", png_of(30_000, 30_000, bomb)),
            *sample(f"{number}mute", data, b"  "),
            *sample(f"{number}code", data, b"\xff\xfe\xfd"),
            (f"{number}lonely.jpg", data),
            (f"{number}blind.txt", b"no picture"),
            *sample(f"{number}json", data),
            (f"{number}json.json", b"{not json"),
            *sample(f"{number}twin", data),
            (f"{number}twin.jpg", data),
            (f"README{number}", b"no suffix"),
        ]
        with tarfile.open(path, "a") as tar:
            for name, content in bad:
                _add(tar, name, content)


def sample(key: str, picture: bytes, caption: bytes = b"a caption") -> list[tuple[str, bytes]]:
    """The members of a pair."""
    return [(f"{key}.jpg", picture), (f"{key}.txt", caption)]


def png_of(width: int, height: int, data: bytes) -> bytes:
    """A PNG file whose header tells of so many pixels, grey, 8 bits."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def write_tokenizers(folder: Path, *, width: int, layers: int, image_size: int, patch_size: int) -> None:
    """FOLDER/tokenizer/visual_tokenizer and FOLDER/text."""
    torch.manual_seed(0)
    visual = VisualTokenizer(
        VisualTokenizerConfig(
            encoder=VisionEncoderConfig(
                image_size=image_size, patch_size=patch_size, width=width, layers=layers, head_width=min(64, width // 2),
                mlp_hidden=4 * width, head_out=width,
            ),
            merger=MergerConfig(layers=2, heads=4, mlp_hidden=4 * width),
            codebook=CodebookConfig(size=1024, dim=16),
            decoder=TokenizerDecoderConfig(depth=1, heads=4, mlp_hidden=width, unet_dim=16),
        )
    )  # fmt: skip
    initialise(visual)
    save_visual_tokenizer(visual, folder / "tokenizer")
    train_text_tokenizer([f"picture {n} of tar {n} is blurred in {n} ways" for n in range(100)], 400, folder / "text")


def start_job(world: Path, run_dir: Path, *settings: str, log: Path | None = None) -> subprocess.Popen[bytes]:
    """`data_prep/pretokenize.py` on WORLD/pairs with the tokenizers in WORLD."""
    arguments = [f"run_dir={run_dir}", f"pairs={world}/pairs", f"tokenizer={world}/tokenizer", f"text_tokenizer={world}/text"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (log or Path(os.devnull)).open("ab") as output:
        command = [sys.executable, str(PROGRAM), *arguments, *settings]
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def _picture(random: np.random.Generator, side: int) -> bytes:
    image = Image.fromarray(random.integers(0, 255, (side, side, 3), np.uint8)).filter(ImageFilter.GaussianBlur(2))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
