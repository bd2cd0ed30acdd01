"""From the bytes of a picture to the tower's input, and back."""

from __future__ import annotations

import io
from contextlib import suppress

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from lavit_dist.config.images import MAX_PIXELS
from lavit_dist.data.quarantine import SampleError

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of each channel in CLIP's preprocessing, which the released LaVIT shares."""
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of each channel in CLIP's preprocessing."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""The decoders that foreign bytes may reach; Pillow has others that start programs (EPS) or read other files."""


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in `data` as 8-bit RGB, turned upright by its EXIF orientation.

    Of an animation it is the first frame. 16-bit greys keep their upper 8 bits. Transparency is dropped, as the released code does it
    (`convert("RGB")`): the colours beneath show. CMYK is taken to be inverted, as Adobe writes it into JPEG. Colour profiles are passed
    over. TIFF, AVIF, HEIC and other formats beside `FORMATS` are refused.

    The size in the header is checked before any pixel is decoded. Raises `SampleError` with `unreadable_image` for anything that
    isn't a whole picture, and `image_bomb` for more than `max_pixels` pixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height <= max_pixels:
            image.load()
            with suppress(Exception):  # damaged EXIF data are no reason to lose a picture
                ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except Image.DecompressionBombError as error:
        raise SampleError("image_bomb", str(error), data) from error
    except UnidentifiedImageError as error:
        raise SampleError("unreadable_image", f"{len(data)} bytes that are no {', '.join(FORMATS)} picture", data) from error
    except Exception as error:  # Pillow's decoders raise all kinds of exceptions on damaged bytes
        raise SampleError("unreadable_image", f"{type(error).__name__}: {error}", data) from error
    raise SampleError("image_bomb", f"{width} x {height} pixels, more than the {max_pixels} allowed", data)


def image_format(data: bytes) -> str:
    """Pillow's name for the format of bytes that `decode_image` accepts, such as `JPEG`."""
    return str(Image.open(io.BytesIO(data), formats=FORMATS).format)


def resize(image: Image.Image, size: int) -> torch.Tensor:
    """Squashes the whole picture to a square by bicubic interpolation, without cropping: uint8 [3, size, size]."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    # NumPy, because torch would start threads of its own in each of the threads that decode.
    return torch.from_numpy(np.array(np.asarray(image).transpose(2, 0, 1), order="C"))


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 3, H, W] to float32 with CLIP's mean and deviation per channel."""
    mean, std = _channels(IMAGE_MEAN), _channels(IMAGE_STD)
    return (pixels.to(torch.float32) / 255 - mean) / std


def denormalise(pixel_values: torch.Tensor) -> torch.Tensor:
    """Undoes `normalise`: [..., 3, H, W] to shares of full intensity, 0 to 1 for what was a picture."""
    return pixel_values * _channels(IMAGE_STD).to(pixel_values) + _channels(IMAGE_MEAN).to(pixel_values)


def resized(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Square pictures [batch, 3, H, H] at another size, by bicubic interpolation, which may overshoot their range."""
    if pixels.shape[-1] == size:
        return pixels
    return F.interpolate(pixels, size=size, mode="bicubic", antialias=True)


def preprocess(image: Image.Image, size: int) -> torch.Tensor:
    """The tower's input: bicubic squash to [3, size, size], then CLIP's mean and deviation, float32."""
    return normalise(resize(image, size))


def to_image(pixel_values: torch.Tensor) -> Image.Image:
    """One normalised picture [3, H, W] as an image; values out of range are clipped."""
    pixels = (denormalise(pixel_values.detach().float().cpu()) * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


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


def _channels(values: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor(values).view(3, 1, 1)
