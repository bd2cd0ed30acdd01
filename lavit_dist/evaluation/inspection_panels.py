"""The pictures of an inspection: maps of one picture, and rows of patches that share a code."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from PIL import Image, ImageDraw

from lavit_dist.evaluation.inspection import InspectedImage, Inspection
from lavit_dist.evaluation.panels import ERROR_COLOURS, PAPER, PROBABILITY_COLOURS, enlarged, font, heat_map

BRIGHTEST = 0.99
"""Share of the losses of all patches below the brightest colour."""
OUTSIDE = (203, 213, 225)
"""Colour of what lies beyond a picture's edge."""
MARK = (255, 255, 255), (15, 23, 42)
"""Colours of the frame around a patch, inner and outer line."""
DIGIT_WIDTH = 0.6
"""Width of a digit, as a share of the height of the type."""
LARGEST_DIGITS = 22


def brightest_loss(inspection: Inspection) -> float:
    """The loss of a patch that is shown in the brightest colour."""
    return float(torch.quantile(torch.cat([image.errors for image in inspection.images]), BRIGHTEST))


def maps(image: InspectedImage, brightest: float, side: int) -> Iterator[tuple[str, Image.Image]]:
    """Everything about a picture, each with its name; what there isn't is left out."""
    yield "image", enlarged(image.picture, side)
    probability = image.keep_probability
    name = f"keep probability, {probability.min():.2f} to {probability.max():.2f}"
    yield name, heat_map(image.picture, probability, 0, 1, PROBABILITY_COLOURS, side)
    if image.rebuilt is not None and image.attainable is not None:
        yield "rebuilt from the tokens", enlarged(image.rebuilt, side)
        yield "rebuilt from the features", enlarged(image.attainable, side)
    yield f"loss per patch, 0 to {brightest:.2f}", heat_map(image.picture, image.errors, 0, brightest, ERROR_COLOURS, side)
    if image.painted is not None:
        yield "painted from the tokens", enlarged(image.painted, side)


def id_map(image: InspectedImage, kept: Image.Image, largest_code: int) -> Image.Image:
    """The ids written into `kept`, the picture with its dropped patches dimmed."""
    grid = round(len(image.keep_mask) ** 0.5)
    cell = kept.width / grid
    digits = len(str(largest_code))
    size = int(min(LARGEST_DIGITS, 0.45 * cell, (cell - 3) / (DIGIT_WIDTH * digits)))
    drawn = kept.copy()
    draw = ImageDraw.Draw(drawn)
    for patch, code in zip(image.keep_mask.nonzero().flatten().tolist(), image.codes.tolist(), strict=True):
        row, column = divmod(patch, grid)
        centre = ((column + 0.5) * cell, (row + 0.5) * cell)
        draw.text(centre, str(code), fill=(255, 255, 255), font=font(size), anchor="mm", stroke_width=2, stroke_fill=(0, 0, 0))
    return drawn


def patch_row(inspection: Inspection, code: int, number: int, context: int, side: int, between: int) -> Image.Image | None:
    """Patches with `code`, each with `context` patches on every side of it and a frame around it; None where there are none."""
    thumbs = [thumb(inspection, *place, context, side) for place in inspection.usage.places(code, number)]
    if not thumbs:
        return None
    row = Image.new("RGB", (len(thumbs) * (side + between) - between, side), PAPER)
    for position, each in enumerate(thumbs):
        row.paste(each, (position * (side + between), 0))
    return row


def thumb(inspection: Inspection, number: int, patch: int, context: int, side: int) -> Image.Image:
    """One patch of picture `number` and what is around it, `side` pixels wide."""
    picture = inspection.pictures[number]
    grid = round(len(inspection.images[0].keep_mask) ** 0.5)
    size = picture.width // grid
    row, column = divmod(patch, grid)
    wide = (2 * context + 1) * size
    cut = Image.new("RGB", (wide, wide), OUTSIDE)
    cut.paste(picture, ((context - column) * size, (context - row) * size))
    shown = cut.resize((side, side), Image.Resampling.LANCZOS if size >= 14 else Image.Resampling.NEAREST)
    if context:
        low, high = side * context // (2 * context + 1), side * (context + 1) // (2 * context + 1)
        draw = ImageDraw.Draw(shown)
        draw.rectangle((low - 1, low - 1, high, high), outline=MARK[1])
        draw.rectangle((low, low, high - 1, high - 1), outline=MARK[0])
    return shown
