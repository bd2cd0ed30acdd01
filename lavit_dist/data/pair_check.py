"""Checking a pair as its owner keeps it, and turning it into the one that is written."""

from __future__ import annotations

import io
from pathlib import Path

from lavit_dist.data.pair_sources import SourcePair
from lavit_dist.data.pair_writer import EncodedPair
from lavit_dist.data.pairs import clean_captions
from lavit_dist.data.picture import decode_image, fit_within, image_format
from lavit_dist.data.quarantine import SampleError
from lavit_dist.data.tar_reader import read_bytes

KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats whose bytes are kept as they are, by the suffix they get; MPO is what some cameras write as .jpg."""
JPEG_QUALITY = 95


def check_pair(pair: SourcePair, key: str, max_pixels: int, max_side: int | None) -> EncodedPair:
    """Checks the captions and decodes the picture; keeps its bytes unless it is larger than `max_side` or in an unusual format.

    Raises `SampleError`: `empty_caption`, `missing_image`, `unreadable_image`, `image_bomb`.
    """
    captions = clean_captions(pair.captions)
    data = _image_bytes(pair)
    image = decode_image(data, max_pixels)
    suffix = KEPT_FORMATS.get(image_format(data))
    if max_side is not None and max(image.size) > max_side:
        buffer, suffix = io.BytesIO(), "jpg"
        fit_within(image, max_side).save(buffer, "JPEG", quality=JPEG_QUALITY)
        data = buffer.getvalue()
    elif suffix is None:
        buffer, suffix = io.BytesIO(), "png"
        image.save(buffer, "PNG")
        data = buffer.getvalue()
    renamed = {"source_key": pair.key} if key != pair.key else {}
    return EncodedPair(key, data, suffix, captions, pair.metadata | renamed)


def _image_bytes(pair: SourcePair) -> bytes:
    if not isinstance(pair.image, Path):
        return read_bytes(pair.image)
    try:
        if pair.image.exists() and not pair.image.is_file():
            raise SampleError("unreadable_image", f"{pair.name} is not a regular file")
        return pair.image.read_bytes()
    except FileNotFoundError:
        raise SampleError("missing_image", f"{pair.name} does not exist") from None
    except (OSError, ValueError) as error:  # a folder, no permission, a name that no file can have
        raise SampleError("unreadable_image", f"{pair.name}: {error}") from error
