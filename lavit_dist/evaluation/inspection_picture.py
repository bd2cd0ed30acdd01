"""An inspection at a glance, as one picture."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from lavit_dist.evaluation.inspection import InspectedImage, Inspection
from lavit_dist.evaluation.inspection_panels import brightest_loss, id_map, maps, patch_row
from lavit_dist.evaluation.inspection_words import describe_codes, describe_image, explain_codes, summary
from lavit_dist.evaluation.panels import INK, PAPER, SOFT, Canvas, enlarged, figure_picture, font
from lavit_dist.generation.contact_sheet import dim_dropped
from lavit_dist.observe.report.charts import histogram_figure, usage_figure

SIDE, BETWEEN, MARGIN = 232, 8, 20
COLUMNS = 3
"""Maps beside each other, in two rows."""
LABEL = 20
"""Height of the words over a map, pixels."""
IDS = 2 * SIDE + LABEL + BETWEEN
"""Side of the map of ids, which is as tall as the maps beside it."""
WIDTH = 2 * MARGIN + IDS + COLUMNS * (SIDE + BETWEEN)
MOST_IMAGES, MOST_CODES = 4, 16
THUMB, CODE_LABEL = 76, 190


def draw_inspection(inspection: Inspection, title: str, codes: Sequence[int], patches_per_code: int, context: int) -> Image.Image:
    """The first pictures and codes; the page has the others."""
    canvas = Canvas(WIDTH, MARGIN)
    canvas.words(title, 24)
    figures = [f"{name} {value}" for name, value in summary(inspection)]
    for number, line in enumerate((figures[:4], figures[4:])):
        canvas.words("   ·   ".join(line), 15, SOFT, gap=(4, 16)[number])
    brightest = brightest_loss(inspection)
    for image in inspection.images[:MOST_IMAGES]:
        canvas.words(f"{image.name}: {describe_image(image)}", 15, gap=6)
        canvas.add(_image_row(image, brightest, inspection.usage.codebook_size - 1), 18)
    canvas.words("What the ids stand for", 20, gap=4)
    canvas.words(explain_codes(inspection), 13, SOFT, gap=10)
    number = min(patches_per_code, (WIDTH - 2 * MARGIN - CODE_LABEL) // (THUMB + BETWEEN))
    for words in describe_codes(inspection, list(codes[:MOST_CODES])):
        row = Image.new("RGB", (WIDTH, THUMB), PAPER)
        draw = ImageDraw.Draw(row)
        draw.text((MARGIN, 6), str(words.code), fill=INK, font=font(20))
        draw.text((MARGIN, 32), words.uses, fill=SOFT, font=font(13))
        draw.text((MARGIN, 50), words.likeness, fill=SOFT, font=font(13))
        patches = patch_row(inspection, words.code, number, context, THUMB, BETWEEN)
        if patches is not None:
            row.paste(patches, (MARGIN + CODE_LABEL, 0))
        canvas.add(row, BETWEEN)
    usage = inspection.usage
    tokens = [usage.tokens.count(number) for number in range(len(inspection.images[0].keep_mask) + 1)]
    charts = (
        histogram_figure(tokens, x="tokens", y="pictures"),
        usage_figure(usage.counts.tolist(), x="codes, most used first", y="uses"),
    )
    half = (WIDTH - 2 * MARGIN - BETWEEN) // 2
    canvas.pictures([figure_picture(chart, half) for chart in charts], gap=0, between=BETWEEN)
    return canvas.picture()


def _image_row(image: InspectedImage, brightest: float, largest_code: int) -> Image.Image:
    """The ids over the kept patches, and beside them all other maps in two rows."""
    row = Image.new("RGB", (WIDTH, LABEL + IDS), PAPER)
    row.paste(id_map(image, dim_dropped(enlarged(image.picture, IDS), image.keep_mask), largest_code), (MARGIN, LABEL))
    draw = ImageDraw.Draw(row)
    draw.text((MARGIN, 2), "ids of the kept patches", fill=SOFT, font=font(13))
    for position, (name, picture) in enumerate(maps(image, brightest, SIDE)):
        left = MARGIN + IDS + BETWEEN + position % COLUMNS * (SIDE + BETWEEN)
        top = position // COLUMNS * (SIDE + LABEL + BETWEEN)
        draw.text((left, top + 2), name, fill=SOFT, font=font(13))
        row.paste(picture, (left, top + LABEL))
    return row
