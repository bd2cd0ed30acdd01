"""Pictures in and out: what is refused, and that the preprocessing is CLIP's squash."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from lavit_dist.data.image import IMAGE_MEAN, IMAGE_STD, preprocess, to_image
from lavit_dist.data.picture import decode_image, fit_within, image_format
from lavit_dist.data.quarantine import SampleError


def test_preprocess_squashes_with_pillow_bicubic_and_normalises_by_clip():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8))
    expected = np.asarray(picture.resize((24, 24), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    expected = (expected - IMAGE_MEAN) / IMAGE_STD
    found = preprocess(picture, 24)
    assert found.dtype == torch.float32
    assert found.shape == (3, 24, 24)
    np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_to_image_undoes_preprocess_exactly_and_clips():
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(to_image(preprocess(picture, 16))), np.asarray(picture))
    assert to_image(torch.full((3, 4, 4), 100.0)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("data", [b"", b"html", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_picture_is_unreadable(data):
    with pytest.raises(SampleError) as caught:
        decode_image(data)
    assert caught.value.reason == "unreadable_image"
    assert len(caught.value.sha256) == 64


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_cut_short_is_unreadable_and_a_whole_one_is_read(kind):
    buffer = io.BytesIO()
    noise = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    assert decode_image(buffer.getvalue()).size == (64, 64)
    assert image_format(buffer.getvalue()) == kind
    with pytest.raises(SampleError) as caught:
        decode_image(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    assert caught.value.reason == "unreadable_image"


def test_a_bomb_is_refused_by_its_header_before_any_pixel_is_decoded():
    content = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    header_alone = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + content + struct.pack(">I", zlib.crc32(content))
    header_alone += struct.pack(">I", 100) + b"IDAT"
    for limit in (10_000, 10**12):  # ours, and Pillow's own
        with pytest.raises(SampleError) as caught:
            decode_image(header_alone, limit)
        assert caught.value.reason == "image_bomb"


def test_a_photograph_taken_sideways_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10)).save(buffer, "JPEG", exif=exif)
    assert decode_image(buffer.getvalue()).size == (10, 20)


@pytest.mark.parametrize(("size", "expected"), [((640, 480), (64, 48)), ((30, 20), (30, 20)), ((1000, 1), (64, 1))])
def test_fit_within_keeps_proportions_and_never_enlarges(size, expected):
    assert fit_within(Image.new("RGB", size), 64).size == expected


@pytest.mark.parametrize(
    "data", [b"<html>404</html>", b"\xef\xbb\xbf \n<!DOCTYPE HTML PUBLIC>", b"\r\n<?xml version='1.0'?><svg/>", b"<head></head>"]
)
def test_pages_in_place_of_pictures_are_told_from_damaged_ones(data):
    with pytest.raises(SampleError) as caught:
        decode_image(data)
    assert caught.value.reason == "web_page"
