"""Generation: pictures to captions, prompts to pictures, pictures to their reconstructions.

OUT/captions.jsonl, captions.txt    what `caption` writes: {image, caption} per line, and the captions alone
OUT/000.png, …, pictures.jsonl      what `image` and `reconstruct` write: {file, prompt} or {file, image, tokens} per line
OUT/contact_sheet.png               all of it at a glance
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lavit_dist.checkpoint.official import load_visual_tokenizer, tokenizer_digest
from lavit_dist.config.generate import GenerateConfig, SamplingConfig
from lavit_dist.data.image import to_image
from lavit_dist.errors import UserError, check
from lavit_dist.files import write_atomically
from lavit_dist.generation.contact_sheet import Cell, contact_sheet, dim_dropped
from lavit_dist.generation.language_model import LanguageModel
from lavit_dist.generation.painter import Painter
from lavit_dist.generation.reader import read_image, tokenize_repeatedly
from lavit_dist.models.visual_tokenizer import TokenizedImages, VisualTokenizer
from lavit_dist.observe.logs import setup_logging
from lavit_dist.parallel.distributed import device

logger = logging.getLogger(__name__)


def caption(config: GenerateConfig, images: Sequence[str]) -> None:
    """Describes the image files."""
    _start(config)
    tokenizer = load_visual_tokenizer(_tokenizer_folder(config)).to(device())
    pixels, tokenized = _read(config, tokenizer, images, config.num_tokenizations)
    language_model = _load_language_model(config, tokenizer)
    captions = language_model.caption([each.codes for each in tokenized], config)
    out = Path(config.out)
    lines = [{"image": name, "caption": words} for name, words in zip(images, captions, strict=True)]
    _write_lines(out / "captions.jsonl", lines)
    write_atomically(out / "captions.txt", "".join(words + "\n" for words in captions).encode())
    cells = [Cell((to_image(image),), words) for image, words in zip(pixels, captions, strict=True)]
    _save_sheet(out, cells)
    for name, words in zip(images, captions, strict=True):
        logger.info("%s: %s", name, words)


def draw(config: GenerateConfig, prompts: Sequence[str]) -> None:
    """Paints a picture per prompt."""
    _start(config)
    painter = _load_painter(config)
    codes = _load_language_model(config, painter.tokenizer).draw(prompts, config)
    pictures = painter.paint(codes, config.seed)
    names = _save_pictures(Path(config.out), pictures)
    _write_lines(
        Path(config.out) / "pictures.jsonl",
        [{"file": name, "prompt": prompt} for name, prompt in zip(names, prompts, strict=True)],
    )
    cells = [Cell((picture,), prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
    _save_sheet(Path(config.out), cells)


def reconstruct(config: GenerateConfig, images: Sequence[str]) -> None:
    """Tokenizes image files and paints them back from their codes."""
    _start(config)
    painter = _load_painter(config)
    pixels, (tokenized,) = _read(config, painter.tokenizer, images, 1)
    pictures = painter.paint(tokenized.codes, config.seed)
    names = _save_pictures(Path(config.out), pictures)
    lines, cells = [], []
    for name, image, before, after, codes, keep_mask in zip(
        names, images, pixels, pictures, tokenized.codes, tokenized.keep_mask, strict=True
    ):
        lines.append({"file": name, "image": image, "tokens": len(codes)})
        original = to_image(before)
        cells.append(Cell((original, dim_dropped(original, keep_mask), after), f"{Path(image).name}: {len(codes)} tokens"))
    _write_lines(Path(config.out) / "pictures.jsonl", lines)
    _save_sheet(Path(config.out), cells)


def load_painter(decoder: str, tokenizer: str | None, sampling: SamplingConfig) -> Painter:
    """The decoder in a folder. Raises `UserError` when `tokenizer` names a folder whose codes are not those that it learned from."""
    painter = Painter.load(decoder, sampling, device())
    if tokenizer is not None:
        check(
            tokenizer_digest(tokenizer) == tokenizer_digest(decoder),
            f"The decoder in {decoder} was trained on the codes of another visual tokenizer than {tokenizer};"
            " leave tokenizer unset, or give the decoder that belongs to it.",
        )
    return painter


def _load_painter(config: GenerateConfig) -> Painter:
    if config.decoder is None:
        raise UserError("decoder is not set; pictures need decoder=FOLDER, the RUN_DIR/model of a train_decoder run.")
    return load_painter(config.decoder, config.tokenizer, config)


def _load_language_model(config: GenerateConfig, tokenizer: VisualTokenizer) -> LanguageModel:
    if config.language_model is None:
        raise UserError("language_model is not set; give language_model=FOLDER, the RUN_DIR/model of a pretrain run.")
    return LanguageModel.load(
        config.language_model,
        visual_tokenizer_digest=tokenizer_digest(_tokenizer_folder(config)),
        num_patches=tokenizer.config.encoder.num_patches,
        batch_size=config.batch_size,
        device=device(),
    )


def _start(config: GenerateConfig) -> None:
    setup_logging()
    if config.num_threads:
        torch.set_num_threads(config.num_threads)


def _tokenizer_folder(config: GenerateConfig) -> str:
    folder = config.tokenizer or config.decoder
    assert folder is not None, "GenerateConfig.validate lets neither be missing"
    return folder


def _read(
    config: GenerateConfig, tokenizer: VisualTokenizer, images: Sequence[str], times: int
) -> tuple[list[torch.Tensor], list[TokenizedImages]]:
    """The images' pixels, and `times` tokenizations of them."""
    pixels = [read_image(Path(image), tokenizer.config.encoder.image_size) for image in images]
    keys = [Path(image).stem for image in images]
    return pixels, tokenize_repeatedly(tokenizer, keys, pixels, config, times)


def _save_pictures(out: Path, pictures: Sequence[Image.Image]) -> list[str]:
    out.mkdir(parents=True, exist_ok=True)
    names = [f"{index:03d}.png" for index in range(len(pictures))]
    for name, picture in zip(names, pictures, strict=True):
        picture.save(out / name)
    return names


def _save_sheet(out: Path, cells: Sequence[Cell]) -> None:
    """Writes everything at a glance, and says where it is."""
    contact_sheet(cells).save(out / "contact_sheet.png")
    logger.info("wrote %s", out / "contact_sheet.png")


def _write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
