"""Drawing the scenes of `shapes`: anti-aliased objects on a background of muted tints."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageDraw

from lavit_dist.data.hashing import stable_hash
from lavit_dist.data.shapes import COLOURS, TINTS, Scene, Thing

SUPERSAMPLING = 4
"""Objects are drawn this many times larger and averaged down."""
JPEG_QUALITY = 95


def draw_scene(scene: Scene, image_size: int) -> Image.Image:
    """The picture of a scene, RGB; a pure function of its arguments."""
    background = Image.fromarray(_background(scene, image_size))
    side = image_size * SUPERSAMPLING
    canvas = background.resize((side, side), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        _draw_thing(draw, thing, side)
    return canvas.reduce(SUPERSAMPLING)


def encode_jpeg(image: Image.Image) -> bytes:
    """JPEG without colour subsampling, which would smear the edges of small objects."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def _background(scene: Scene, image_size: int) -> np.ndarray:
    """uint8 [H, W, 3]: the tint, made lighter and darker by the texture."""
    rng = np.random.Generator(np.random.PCG64(stable_hash("background", repr(scene))))
    tint = np.array(TINTS[scene.tint], dtype=np.float32) + rng.uniform(-6, 6, 3).astype(np.float32)
    light = _light(rng, scene.texture, image_size)
    return np.clip(tint * light[..., None], 0, 255).astype(np.uint8)


def _light(rng: np.random.Generator, texture: str, image_size: int) -> np.ndarray:
    """Brightness around 1, float32 [H, W]."""
    if texture == "plain":
        return np.ones((image_size, image_size), dtype=np.float32)
    if texture == "cloudy":
        knots = Image.fromarray(rng.uniform(0.84, 1.16, (6, 6)).astype(np.float32))
        return np.asarray(knots.resize((image_size, image_size), Image.Resampling.BICUBIC))
    angle = rng.uniform(0, 2 * math.pi)
    axis = np.arange(image_size, dtype=np.float32) / image_size - 0.5
    along = axis[None, :] * np.float32(math.cos(angle)) + axis[:, None] * np.float32(math.sin(angle))
    if texture == "shaded":
        return 1 + 0.36 * along
    stripes = rng.uniform(4, 7)
    wave = np.sin(along * np.float32(2 * math.pi * stripes))
    return 1 + 0.07 * np.clip(3 * wave, -1, 1)


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, side: int) -> None:
    colour = COLOURS[thing.colour]
    x, y, radius = thing.x * side, thing.y * side, thing.size * side / 2
    box = (x - radius, y - radius, x + radius, y + radius)
    if thing.shape == "circle":
        draw.ellipse(box, fill=colour)
    else:
        draw.polygon([(x + radius * right, y + radius * down) for right, down in OUTLINES[thing.shape]], fill=colour)


ARM = 0.34
"""Half the width of a cross's arms."""
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -0.95), (1, 0.85), (-1, 0.85)],
    "cross": [
        (-ARM, -1), (ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM),
        (ARM, 1), (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM),
    ],
}  # fmt: skip
"""Corners (right, down) of each polygon within a box from -1 to 1."""
