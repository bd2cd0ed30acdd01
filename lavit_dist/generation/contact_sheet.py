"""Many pictures on one, each with its words beneath."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SMALLEST_SIDE = 192
"""Pictures smaller than this are enlarged to it, pixels."""
MARGIN = 8
FONT_SIZE = 13
CHARACTER_WIDTH = 7.0
"""Average width of a character at that size, pixels."""
LINE_HEIGHT = 17
MOST_LINES = 5
MOST_COLUMNS = 6
INK, PAPER = (30, 30, 30), (255, 255, 255)
DIMMED = 0.2
"""Brightness of a dropped patch."""


@dataclass(frozen=True)
class Cell:
    """One entry of a sheet: pictures side by side, and words."""

    pictures: tuple[Image.Image, ...]
    words: str


def contact_sheet(cells: Sequence[Cell]) -> Image.Image:
    """All cells in rows of equal height; every cell must hold as many pictures as the first."""
    side = max(SMALLEST_SIDE, *cells[0].pictures[0].size)
    per_cell = len(cells[0].pictures)
    width = per_cell * side + MARGIN
    columns = max(1, min(len(cells), MOST_COLUMNS // per_cell))
    lines = [textwrap.wrap(cell.words, int(width / CHARACTER_WIDTH))[:MOST_LINES] for cell in cells]
    height = side + MARGIN + LINE_HEIGHT * max(map(len, lines))
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (MARGIN + columns * width, MARGIN + rows * (height + MARGIN)), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for index, (cell, words) in enumerate(zip(cells, lines, strict=True)):
        left, top = MARGIN + index % columns * width, MARGIN + index // columns * (height + MARGIN)
        for number, picture in enumerate(cell.pictures):
            sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left + number * side, top))
        for number, line in enumerate(words):
            draw.text((left, top + side + 4 + number * LINE_HEIGHT), line, fill=INK, font=font)
    return sheet


def dim_dropped(picture: Image.Image, keep_mask: Tensor) -> Image.Image:
    """The picture with the patches that the selector dropped (False in `keep_mask` [patch], a square grid) darkened."""
    grid = round(len(keep_mask) ** 0.5)
    shades = Image.new("L", (grid, grid))
    shades.putdata([255 if keep else round(255 * DIMMED) for keep in keep_mask.tolist()])
    mask = shades.resize(picture.size, Image.Resampling.NEAREST)
    return Image.composite(picture, Image.new("RGB", picture.size), mask)
