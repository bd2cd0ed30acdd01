"""Pictures from bytes, without torch, so that processes that only decode stay small."""

from __future__ import annotations

import io
from contextlib import suppress

import numpy as np
from imagehash import phash
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from lavit_dist.config.images import MAX_PIXELS
from lavit_dist.data.quarantine import SampleError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""The decoders that foreign bytes may reach; Pillow has others that start programs (EPS) or read other files."""
PAGE_MARKS = (b"<!doctype html", b"<html", b"<head", b"<?xml")
PAGE_BLANKS = b" \t\r\n\xef\xbb\xbf"
"""White space and the byte order mark, which may come before a page."""
PAGE_START = 512


def open_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in `data`, of which only the header has been read.

    Raises `SampleError` with `web_page` for HTML, as servers send it in place of pictures, `unreadable_image` for other bytes that are
    no picture of `FORMATS` (TIFF, AVIF, HEIC among them), and `image_bomb` for more than `max_pixels` pixels.
    """
    pixels = _webp_pixels(data)
    if pixels is not None and pixels > max_pixels:
        raise SampleError("image_bomb", f"{pixels} pixels, more than the {max_pixels} allowed", data)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise SampleError("image_bomb", str(error), data) from error
    except UnidentifiedImageError as error:
        if data[:PAGE_START].lstrip(PAGE_BLANKS).lower().startswith(PAGE_MARKS):
            raise SampleError("web_page", f"{len(data)} bytes of HTML", data) from error
        raise SampleError("unreadable_image", f"{len(data)} bytes that are no {', '.join(FORMATS)} picture", data) from error
    except Exception as error:  # Pillow's decoders raise all kinds of exceptions on damaged bytes
        raise SampleError("unreadable_image", f"{type(error).__name__}: {error}", data) from error
    width, height = image.size
    if width * height > max_pixels:
        raise SampleError("image_bomb", f"{width} x {height} pixels, more than the {max_pixels} allowed", data)
    return image


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in `data` as 8-bit RGB, turned upright by its EXIF orientation.

    Of an animation it is the first frame. 16-bit greys keep their upper 8 bits. Transparency is dropped, as the released code does it
    (`convert("RGB")`): the colours beneath show. CMYK is taken to be inverted, as Adobe writes it into JPEG. Colour profiles are passed
    over.

    Raises `SampleError` as `open_picture` does, and with `unreadable_image` for a picture that isn't whole.
    """
    image = open_picture(data, max_pixels)
    try:
        image.load()
        with suppress(Exception):  # damaged EXIF data are no reason to lose a picture
            ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image)
    except Exception as error:  # as above
        raise SampleError("unreadable_image", f"{type(error).__name__}: {error}", data) from error


def image_format(data: bytes) -> str:
    """Pillow's name for the format of bytes that `decode_image` accepts, such as `JPEG`."""
    return str(Image.open(io.BytesIO(data), formats=FORMATS).format)


def squash(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The whole picture as a square, by bicubic interpolation, without cropping: uint8 [3, size, size]."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.array(np.asarray(image).transpose(2, 0, 1), order="C")


def perceptual_hash(image: Image.Image) -> int:
    """64 bits that copies of a picture in another size, format or quality share, or all but few of them: `imagehash.phash`.

    They tell which of the lowest 8 x 8 frequencies of the greyscale picture, shrunk to 32 x 32 pixels, lie above their median.
    """
    return int.from_bytes(np.packbits(phash(image).hash).tobytes(), "big")


def fit_within(image: Image.Image, max_side: int) -> Image.Image:
    """Shrinks a picture, keeping its proportions, until its longer side is at most `max_side` pixels."""
    scale = max_side / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB. Pillow's own conversion of 16-bit greys would clip everything above 255 to white."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _webp_pixels(data: bytes) -> int | None:
    """Pixels of the canvas of a WebP file; None for other bytes. Pillow makes room for the canvas as soon as it opens one.

    Of the three headers of https://developers.google.com/speed/webp/docs/riff_container.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    body = data[20:30]
    if len(body) < 10:
        return None
    if data[12:16] == b"VP8X":
        return (int.from_bytes(body[4:7], "little") + 1) * (int.from_bytes(body[7:10], "little") + 1)
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return ((bits & 0x3FFF) + 1) * ((bits >> 14 & 0x3FFF) + 1)
    return (int.from_bytes(body[6:8], "little") & 0x3FFF) * (int.from_bytes(body[8:10], "little") & 0x3FFF)
