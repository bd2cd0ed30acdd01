"""The inspector: what a visual tokenizer makes of pictures.

OUT/index.html    every picture with its patches, ids and what comes back; what ids stand for; use of the codes; what can't be read
OUT/page.png      the first of all that, as one picture
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor

from lavit_dist import __version__
from lavit_dist.checkpoint.official import load_visual_tokenizer
from lavit_dist.config.inspect_tokenizer import InspectTokenizerConfig
from lavit_dist.data.named_pictures import NamedPicture, list_pictures, read_pictures
from lavit_dist.data.pairs import list_shards
from lavit_dist.data.quarantine import Quarantined
from lavit_dist.errors import UserError, check
from lavit_dist.evaluation.inspection import Inspection, Inspector
from lavit_dist.evaluation.inspection_page import inspection_page
from lavit_dist.evaluation.inspection_picture import draw_inspection
from lavit_dist.files import write_atomically
from lavit_dist.models.visual_tokenizer import VisualTokenizer
from lavit_dist.observe.logs import setup_logging
from lavit_dist.parallel.distributed import device

logger = logging.getLogger(__name__)
PAGE, PICTURE = "index.html", "page.png"


def run(config: InspectTokenizerConfig, names: Sequence[str]) -> None:
    """Writes both pages about the image files and tars in `names`."""
    setup_logging()
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    refused: list[Quarantined] = []
    if config.decoder is None:
        assert config.tokenizer is not None, "the settings' validate lets neither be missing"
        inspection = inspect(load_visual_tokenizer(config.tokenizer).to(device()), config, names, refused)
    else:
        from pipelines.generate import load_painter  # brings diffusers, which takes seconds to import

        painter = load_painter(config.decoder, config.tokenizer, config.sampling)
        inspection = inspect(painter.tokenizer, config, names, refused)
        painted = painter.paint([image.codes.to(device()) for image in inspection.images], config.seed)
        images = [replace(image, painted=picture) for image, picture in zip(inspection.images, painted, strict=True)]
        inspection = replace(inspection, images=images)
    for record in refused:
        logger.warning("%s can't be used: %s", record.key, record.message)
    write(config, inspection, refused)


def inspect(
    tokenizer: VisualTokenizer, config: InspectTokenizerConfig, names: Sequence[str], refused: list[Quarantined]
) -> Inspection:
    """Tokenizes the pictures that are named, and those of `config.pairs`; a record of each that can't be used goes to `refused`.

    Raises `UserError` when none of those that are named can be used, and for codes that the codebook doesn't have.
    """
    sizes = tokenizer.config
    for code in config.codes:
        check(
            code < sizes.codebook.size,
            f"codes holds {code}, but the codebook has {sizes.codebook.size} codes; name some of 0 to {sizes.codebook.size - 1}.",
        )
    named = list_pictures(names, refused)
    reference = _reference(config, {picture.place for picture in named})
    inspector = Inspector(
        tokenizer,
        seed=config.seed if config.selection == "gumbel" else None,
        num_expected=min(len(named) + len(reference), config.num_images + config.num_reference),
    )

    def read(pictures: Sequence[NamedPicture]) -> Iterator[tuple[NamedPicture, Tensor]]:
        return read_pictures(pictures, sizes.encoder.image_size, config.max_pixels, refused)

    readable = read(named)
    for batch in _batches(islice(readable, config.num_images), config.batch_size):
        inspector.add(*batch, show=True)
    if not inspector.pictures:
        raise UserError(_none_usable(names, refused))
    for batch in _batches(islice(chain(readable, read(reference)), config.num_reference), config.batch_size):
        inspector.add(*batch, show=False)
    return inspector.finish()


def write(config: InspectTokenizerConfig, inspection: Inspection, refused: Sequence[Quarantined]) -> None:
    """Both pages."""
    folder = config.decoder or config.tokenizer
    title = f"What the tokenizer in {folder} sees"
    codes = config.codes or tuple(inspection.usage.most_widespread(config.num_codes))
    how = f"sampled by their probabilities, seed {config.seed}" if config.selection == "gumbel" else "the most probable"
    page = inspection_page(
        inspection,
        title=title,
        subtitle=f"The patches that were kept are {how}. lavit_dist {__version__}.",
        codes=codes,
        patches_per_code=config.patches_per_code,
        context=config.context,
        refused=refused,
    )
    write_atomically(Path(config.out) / PAGE, page.encode())
    buffer = io.BytesIO()
    draw_inspection(inspection, title, codes, config.patches_per_code, config.context).save(buffer, format="PNG")
    write_atomically(Path(config.out) / PICTURE, buffer.getvalue())
    logger.info(
        "wrote %s and %s beside it: %d pictures shown, %d can't be used",
        Path(config.out) / PAGE,
        PICTURE,
        len(inspection.images),
        len(refused),
    )


def _reference(config: InspectTokenizerConfig, known: set[tuple[Path, int]]) -> list[NamedPicture]:
    """Enough of the further pictures for any that can't be read, without those that are named anyway."""
    pictures: list[NamedPicture] = []
    for shard in list_shards(config.pairs) if config.pairs else ():
        pictures += [picture for picture in list_pictures([shard], []) if picture.place not in known]
        if len(pictures) >= 2 * config.num_reference:
            break
    return pictures


def _batches(readable: Iterator[tuple[NamedPicture, Tensor]], batch_size: int) -> Iterator[tuple[list[str], list[str], Tensor]]:
    """Names, keys and pixels [picture, 3, H, W] of so many pictures at a time."""
    while batch := list(islice(readable, batch_size)):
        pictures, pixel_values = zip(*batch, strict=True)
        yield [picture.name for picture in pictures], [picture.key for picture in pictures], torch.stack(pixel_values)


def _none_usable(names: Sequence[str], refused: Sequence[Quarantined]) -> str:
    found = f"{refused[0].key}: {refused[0].message}" if refused else "there is none in them"
    return (
        f"No picture can be used of {', '.join(names[:3])}{' and others' if len(names) > 3 else ''} ({found}); name JPEG, PNG or WebP"
        " files, or tars that hold some."
    )
