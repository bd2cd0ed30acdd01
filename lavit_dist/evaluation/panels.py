"""The small pictures that sheets and pages about a tokenizer are made of."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from functools import cache

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

INK, SOFT, LINE, PAPER = (15, 23, 42), (71, 85, 105), (226, 232, 240), (255, 255, 255)
ERROR_COLOURS, PROBABILITY_COLOURS = "inferno", "viridis"
OVERLAY = 0.8
"""Weight of a heat map over the grey picture beneath it."""
CHARACTER_WIDTH = 0.5
"""Average width of a character, as a share of the height of the type."""
PIXELATED_BELOW = 128
"""Pictures smaller than this are enlarged without smoothing, pixels."""


def enlarged(picture: Image.Image, side: int) -> Image.Image:
    """The square picture at `side` pixels."""
    method = Image.Resampling.NEAREST if picture.width < PIXELATED_BELOW else Image.Resampling.LANCZOS
    return picture.resize((side, side), method)


def heat_map(picture: Image.Image, values: Tensor, low: float, high: float, colours: str, side: int) -> Image.Image:
    """`values` [patch] from `low` to `high` in colour, over the grey picture, which shows what is where."""
    grid = round(len(values) ** 0.5)
    shares = ((values.float().cpu().numpy() - low) / max(high - low, 1e-9)).clip(0, 1).reshape(grid, grid)
    colour = Image.fromarray((matplotlib.colormaps[colours](shares)[..., :3] * 255).astype(np.uint8))
    grey = enlarged(picture.convert("L").convert("RGB"), side)
    return Image.blend(grey, colour.resize((side, side), Image.Resampling.NEAREST), OVERLAY)


def colour_bar(colours: str, width: int, height: int) -> Image.Image:
    """The colours from low to high."""
    ramp = matplotlib.colormaps[colours](np.linspace(0, 1, width))[None, :, :3]
    return Image.fromarray((ramp * 255).astype(np.uint8)).resize((width, height))


def figure_picture(figure: Figure, width: int) -> Image.Image:
    """A matplotlib figure as a picture of `width` pixels."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=width / figure.get_figwidth())
    return Image.open(buffer).convert("RGB")


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The typeface of all words."""
    return ImageFont.load_default(size)


class Canvas:
    """A white picture that grows downwards as rows are put on it."""

    def __init__(self, width: int, margin: int) -> None:
        self.width, self.margin = width, margin
        self._rows: list[tuple[int, Image.Image]] = []
        self.height = margin

    def words(self, text: str, size: int, colour: tuple[int, int, int] = INK, gap: int = 4) -> None:
        """Words, in as many lines as they need, with `gap` pixels beneath."""
        lines = textwrap.wrap(text, int((self.width - 2 * self.margin) / (CHARACTER_WIDTH * size))) or [""]
        row = Image.new("RGB", (self.width, len(lines) * (size + 6)), PAPER)
        for number, line in enumerate(lines):
            ImageDraw.Draw(row).text((self.margin, 1 + number * (size + 6)), line, fill=colour, font=font(size))
        self.add(row, gap)

    def pictures(self, pictures: Sequence[Image.Image], gap: int, between: int) -> None:
        """Pictures side by side, aligned at the top."""
        row = Image.new("RGB", (self.width, max(picture.height for picture in pictures)), PAPER)
        left = self.margin
        for picture in pictures:
            row.paste(picture, (left, 0))
            left += picture.width + between
        self.add(row, gap)

    def add(self, row: Image.Image, gap: int) -> None:
        """A row of the whole width, with `gap` pixels beneath."""
        self._rows.append((self.height, row))
        self.height += row.height + gap

    def picture(self) -> Image.Image:
        """All rows, in one."""
        whole = Image.new("RGB", (self.width, self.height + self.margin), PAPER)
        for top, row in self._rows:
            whole.paste(row, (0, top))
        return whole
