"""Odd pictures: every kind that turns up in crawled data is read in a defined way, or refused in a word."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lavit_dist.data.image import preprocess
from lavit_dist.data.picture import decode_image
from lavit_dist.data.quarantine import SampleError


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data):
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 256, (12, 20, 4), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
def test_a_grey_picture_has_three_equal_channels(noise, kind):
    grey = Image.fromarray(noise[..., 0])
    found = pixels(encoded(grey, kind))
    assert (found == found[..., :1]).all()
    if kind in ("PNG", "GIF", "BMP"):
        assert (found[..., 0] == noise[..., 0]).all()


def test_black_and_white_is_0_and_255(noise):
    assert set(np.unique(pixels(encoded(Image.fromarray(noise[..., 0] > 127))))) == {0, 255}


def test_16_bit_greys_keep_their_upper_byte_and_are_not_clipped():
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    found = pixels(encoded(Image.fromarray(ramp)))
    assert (found == (ramp >> 8)[..., None]).all()


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bit_colours_and_16_bit_transparency_keep_their_upper_byte(colour_type, channels):
    """Pillow writes none of these, so the file is put together here: no filter, one row after another."""
    values = np.random.default_rng(1).integers(0, 65536, (5, 7, channels), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    found = pixels(png(7, 5, 16, colour_type, zlib.compress(rows)))
    expected = (values >> 8).astype(np.uint8)
    assert (found == (expected[..., :1] if channels == 2 else expected[..., :3])).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_is_dropped_and_the_colours_beneath_show_as_in_the_released_code(noise, mode, kind):
    image = Image.fromarray(noise).convert(mode)
    data = encoded(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    assert (pixels(data) == np.asarray(image.convert("RGB"))).all()
    assert (pixels(data) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


@pytest.mark.parametrize(("kind", "transparency"), [("PNG", 0), ("PNG", bytes([0, 128, 255])), ("GIF", 0)])
def test_a_palette_with_transparency_gives_the_palettes_colours(kind, transparency):
    image = Image.fromarray(np.arange(3, dtype=np.uint8).repeat(4).reshape(3, 4))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert pixels(encoded(image, kind, transparency=transparency))[:, 0].tolist() == [[10, 20, 30], [40, 50, 60], [70, 80, 90]]


@pytest.mark.parametrize(
    ("ink", "colour"),
    [
        ((0, 0, 0, 0), (255, 255, 255)),
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 255, 255, 0), (255, 0, 0)),
        ((0, 0, 0, 255), (0, 0, 0)),
    ],
)
def test_cmyk_jpeg_is_read_inverted_as_adobe_writes_it(ink, colour):
    data = encoded(Image.new("CMYK", (16, 16), ink), "JPEG", quality=95)
    assert b"Adobe" in data
    assert abs(pixels(data)[8, 8].astype(int) - colour).max() <= 3


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (9, 9), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert pixels(data)[4, 4].tolist() == [200, 0, 0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("orientation", "red"), list(enumerate(["tl", "tr", "br", "bl"] * 2, start=1)))
def test_all_eight_exif_orientations_come_out_upright(kind, orientation, red):
    """The file is stored so that its red corner comes to `red`; orientations from 5 on also swap the sides."""
    stored = np.full((16, 32, 3), 255, np.uint8)
    stored[:8, :8] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = pixels(encoded(Image.fromarray(stored), kind, exif=exif)).astype(int)
    assert found.shape == ((32, 16, 3) if orientation >= 5 else (16, 32, 3))
    row, column = {"t": 3, "b": -4}[red[0]], {"l": 3, "r": -4}[red[1]]
    assert abs(found[row, column] - (255, 0, 0)).max() < 40
    assert (abs(found - (255, 0, 0)).max(-1) < 120).sum() < 120


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"", b"Exif\0\0II*\0\xff\xff\xff\x7f"])
def test_damaged_exif_data_cost_no_picture(exif):
    assert pixels(encoded(Image.new("RGB", (20, 10)), "JPEG", exif=exif)).shape == (10, 20, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 2)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_tiny_and_very_long_pictures_are_squashed_like_any_other(size, kind):
    found = preprocess(decode_image(encoded(Image.new("RGB", size, (200, 100, 50)), kind)), 28)
    assert found.shape == (3, 28, 28)
    assert abs(found - found.mean((1, 2), keepdim=True)).max() < 1e-5


@pytest.mark.parametrize("side", [20_000, 12_000])  # above Pillow's own limit, and between that and ours
def test_20000_by_20000_pixels_are_refused_by_their_header_and_take_no_memory(side):
    """In a process of its own, whose peak memory is read before and after; the larger picture would take 400 MB, or 1.2 GB as RGB."""
    program = """
import resource, sys
from lavit_dist.data.picture import decode_image
from lavit_dist.data.quarantine import SampleError
data = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode_image(data)
except SampleError as error:
    print(error.reason, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    compressor = zlib.compressobj(1)
    rows = b"".join(compressor.compress(bytes(side + 1)) for _ in range(side)) + compressor.flush()
    data = png(side, side, 8, 0, rows)
    found = subprocess.run([sys.executable, "-c", program], input=data, capture_output=True, check=True, timeout=120)
    reason, kilobytes = found.stdout.decode().split()
    assert reason == "image_bomb"
    assert int(kilobytes) < 16_000


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 1}, {"quality": 1, "exif": b"Exif\0\0"}])
def test_a_large_webp_is_refused_before_pillow_makes_room_for_it(options, monkeypatch):
    """Of its three kinds of headers; Pillow reserves the whole canvas in opening the file."""
    data = encoded(Image.new("RGB", (640, 480)), "WEBP", **options)
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(SampleError, match="307200 pixels") as caught:
        decode_image(data, 300_000)
    assert caught.value.reason == "image_bomb"


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO", "TGA"])
def test_other_formats_are_refused_and_the_legal_ones_named(kind):
    with pytest.raises(SampleError, match="JPEG, PNG, WEBP, GIF, BMP") as caught:
        decode_image(encoded(Image.new("RGB", (16, 16)), kind))
    assert caught.value.reason == "unreadable_image"


@given(data=st.data())
def test_no_damage_raises_anything_but_a_sample_error(data):
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP"]))
    damaged = bytearray(encoded(Image.fromarray(np.random.default_rng(3).integers(0, 256, (20, 20, 3), dtype=np.uint8)), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decode_image(bytes(damaged), 10_000).mode == "RGB"
    except SampleError as error:
        assert error.reason in ("unreadable_image", "image_bomb")


def png(width, height, bits, colour_type, compressed):
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", compressed) + chunk(b"IEND", b"")
