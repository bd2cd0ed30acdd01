"""A packed row as one picture: its slots in three strips, and a card for each document beneath.

The typeface has no more than Latin letters; what it lacks is a box, and the printout has it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from lavit_dist.data.micro_batch import PADDING_DOCUMENT
from lavit_dist.data.picture import fit_within
from lavit_dist.data.seen_rows import Loss, SeenDocument, SeenRow, Slot
from lavit_dist.evaluation.panels import CHARACTER_WIDTH, INK, LINE, PAPER, SOFT, Canvas, font
from lavit_dist.evaluation.row_words import describe_document, describe_row, describe_source

Colour = tuple[int, int, int]
DOCUMENTS: tuple[Colour, ...] = (
    (78, 121, 167),
    (242, 142, 43),
    (89, 161, 79),
    (225, 87, 89),
    (118, 183, 178),
    (176, 122, 161),
    (237, 201, 72),
    (156, 117, 95),
    (255, 157, 167),
    (121, 112, 110),
)
"""Colours of documents, in turn (Tableau 10, reordered so that neighbours differ)."""
BRIGHT = 160
"""Luma above which a colour takes dark numbers."""
PADDING: Colour = LINE
SLOTS: dict[Slot, Colour] = {
    Slot.TEXT: (37, 99, 235),
    Slot.IMAGE_MARK: (15, 23, 42),
    Slot.CODE: (251, 146, 60),
    Slot.EOS: (220, 38, 38),
    Slot.PADDING: PADDING,
}
SLOT_NAMES = {
    Slot.TEXT: "text",
    Slot.IMAGE_MARK: "[IMG], [/IMG]",
    Slot.CODE: "codes",
    Slot.EOS: "EOS",
    Slot.PADDING: "padding",
}
LOSSES: dict[Loss, Colour] = {Loss.NONE: PADDING, Loss.TEXT: (37, 99, 235), Loss.IMAGE: (234, 88, 12)}
LOSS_NAMES = {Loss.NONE: "weight 0", Loss.TEXT: "weight > 0, on text, [IMG], EOS", Loss.IMAGE: "weight > 0, on codes, [/IMG]"}
STRIPS = ("documents", "tokens", "loss")

MARGIN, BETWEEN, NAMES = 20, 10, 96
STRIP_WIDTH, STRIP_HEIGHT, STRIP_GAP, AXIS = 1408, 24, 3, 22
WIDTH = 2 * MARGIN + NAMES + STRIP_WIDTH
LEAST_SCALE = 2
"""Pixels per slot: single slots stay visible, so that a long row goes over several lines."""
TICKS = (8, 16, 32, 64, 128, 256, 512)
TICK_PIXELS = 80
LINE_MULTIPLE = 64
"""Lines of a long row begin at round numbers."""
COLUMNS, MOST_CARDS, CARD_HEIGHT, THUMB, BADGE = 2, 60, 112, 104, 26
TEXT_LINES = 3


class StripLayout:
    """Where the slots of a row lie in the picture of its strips: left to right, on as many lines as they need."""

    def __init__(self, seq_len: int) -> None:
        lines = math.ceil(seq_len * LEAST_SCALE / STRIP_WIDTH)
        self.slots_per_line = seq_len if lines == 1 else LINE_MULTIPLE * math.ceil(seq_len / lines / LINE_MULTIPLE)
        self.num_lines = math.ceil(seq_len / self.slots_per_line)
        self.scale = STRIP_WIDTH // self.slots_per_line
        """Pixels per slot."""
        self.line_height = len(STRIPS) * (STRIP_HEIGHT + STRIP_GAP) + AXIS

    @property
    def height(self) -> int:
        return self.num_lines * self.line_height

    def corner(self, slot: int, strip: int) -> tuple[int, int]:
        """The upper left pixel of a slot in strip 0, 1 or 2."""
        line, place = divmod(slot, self.slots_per_line)
        return MARGIN + NAMES + place * self.scale, line * self.line_height + strip * (STRIP_HEIGHT + STRIP_GAP)


def document_colour(number: int) -> Colour:
    """The colour of a row's document `number`, from 0, or of padding."""
    return PADDING if number == PADDING_DOCUMENT else DOCUMENTS[number % len(DOCUMENTS)]


def ink_on(colour: Colour) -> Colour:
    """What can be read on it, dark or light (ITU-R BT.601 luma)."""
    red, green, blue = colour
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > BRIGHT else PAPER


def draw_row(row: SeenRow, texts: Sequence[str], images: Sequence[Image.Image | None], note: str = "") -> Image.Image:
    """The strips of a row, and for each document its words in `texts` beside its picture in `images`; `note` goes under the title."""
    canvas = Canvas(WIDTH, MARGIN)
    canvas.words(describe_row(row), 19, gap=6)
    if note:
        canvas.words(note, 14, SOFT, gap=6)
    canvas.add(_legend("tokens:", [(SLOT_NAMES[kind], colour) for kind, colour in SLOTS.items()]), 2)
    canvas.add(
        _legend(
            "loss of each slot, which predicts the next token:", [(LOSS_NAMES[kind], colour) for kind, colour in LOSSES.items()]
        ),
        8,
    )
    canvas.add(draw_strips(row), 12)
    numbers = range(min(len(row.documents), MOST_CARDS))
    cards = [_card(number, row.documents[number], texts[number], images[number]) for number in numbers]
    for start in range(0, len(cards), COLUMNS):
        canvas.pictures(cards[start : start + COLUMNS], gap=BETWEEN, between=BETWEEN)
    if len(row.documents) > MOST_CARDS:
        canvas.words(f"and {len(row.documents) - MOST_CARDS} more documents, which the printout has", 14, SOFT)
    return canvas.picture()


def draw_strips(row: SeenRow) -> Image.Image:
    """Documents, tokens and loss along the slots."""
    layout = StripLayout(len(row.slots))
    picture = Image.new("RGB", (WIDTH, layout.height), PAPER)
    colours = (
        np.array([document_colour(number) for number in row.document_ids.tolist()], np.uint8),
        np.array([SLOTS[Slot(kind)] for kind in row.slots.tolist()], np.uint8),
        np.array([LOSSES[Loss(kind)] for kind in row.losses.tolist()], np.uint8),
    )
    draw = ImageDraw.Draw(picture)
    for first in range(0, len(row.slots), layout.slots_per_line):
        end = min(first + layout.slots_per_line, len(row.slots))
        for strip, name in enumerate(STRIPS):
            left, top = layout.corner(first, strip)
            picture.paste(_bar(colours[strip][first:end], layout.scale), (left, top))
            draw.text((MARGIN, top + 4), name, fill=SOFT, font=font(14))
        _number_documents(draw, layout, row.document_ids, first, end)
        _axis(draw, layout, first, end)
    return picture


def _bar(colours: NDArray[np.uint8], scale: int) -> Image.Image:
    """Slots of these colours [slot, 3], side by side."""
    return Image.fromarray(np.repeat(np.repeat(colours[None], scale, axis=1), STRIP_HEIGHT, axis=0))


def _number_documents(
    draw: ImageDraw.ImageDraw, layout: StripLayout, document_ids: NDArray[np.int32], first: int, end: int
) -> None:
    for number in np.unique(document_ids[first:end]).tolist():
        if number != PADDING_DOCUMENT:
            slots = first + np.flatnonzero(document_ids[first:end] == number)
            left, top = layout.corner(int(slots[0]), 0)
            words, width = str(number + 1), len(slots) * layout.scale
            if width > draw.textlength(words, font=font(14)) + 4:
                draw.text(
                    (left + width // 2, top + STRIP_HEIGHT // 2),
                    words,
                    fill=ink_on(document_colour(number)),
                    font=font(14),
                    anchor="mm",
                )


def _axis(draw: ImageDraw.ImageDraw, layout: StripLayout, first: int, end: int) -> None:
    every = next((tick for tick in TICKS if tick * layout.scale >= TICK_PIXELS), TICKS[-1])
    for slot in range(-(-first // every) * every, end, every):
        left, top = layout.corner(slot, len(STRIPS))
        draw.line((left, top - 1, left, top + 3), fill=SOFT)
        draw.text((left + 3, top), str(slot), fill=SOFT, font=font(12))


def _legend(title: str, entries: Sequence[tuple[str, Colour]]) -> Image.Image:
    row = Image.new("RGB", (WIDTH, 22), PAPER)
    draw = ImageDraw.Draw(row)
    draw.text((MARGIN, 3), title, fill=SOFT, font=font(14))
    left = MARGIN + int(draw.textlength(title, font=font(14))) + 12
    for name, colour in entries:
        draw.rectangle((left, 4, left + 14, 18), fill=colour)
        draw.text((left + 20, 3), name, fill=INK, font=font(14))
        left += 44 + int(draw.textlength(name, font=font(14)))
    return row


def _card(number: int, document: SeenDocument, text: str, image: Image.Image | None) -> Image.Image:
    width = (WIDTH - 2 * MARGIN - (COLUMNS - 1) * BETWEEN) // COLUMNS
    card = Image.new("RGB", (width, CARD_HEIGHT), PAPER)
    draw = ImageDraw.Draw(card)
    draw.rectangle((0, 0, width - 1, CARD_HEIGHT - 1), outline=LINE)
    colour = document_colour(number)
    draw.rectangle((0, 0, BADGE, CARD_HEIGHT - 1), fill=colour)
    draw.text((BADGE // 2 + 1, CARD_HEIGHT // 2), str(number + 1), fill=ink_on(colour), font=font(14), anchor="mm")
    left = BADGE + 6
    if document.image is not None:
        _paste_thumbnail(card, image, left, (CARD_HEIGHT - THUMB) // 2)
        left += THUMB + 8
    room = width - left - 8
    draw.text((left, 5), _cut(f"{document.key}   {describe_source(document)}", 14, room), fill=INK, font=font(14))
    draw.text((left, 25), _cut(describe_document(document), 13, room), fill=SOFT, font=font(13))
    lines = textwrap.wrap(text, int(room / (CHARACTER_WIDTH * 14)), max_lines=TEXT_LINES, placeholder=" …")
    for line, words in enumerate(lines):
        draw.text((left, 47 + 20 * line), words, fill=INK, font=font(14))
    return card


def _paste_thumbnail(card: Image.Image, image: Image.Image | None, left: int, top: int) -> None:
    if image is None:
        draw = ImageDraw.Draw(card)
        draw.rectangle((left, top, left + THUMB - 1, top + THUMB - 1), fill=LINE)
        draw.text((left + THUMB // 2, top + THUMB // 2), "not at hand", fill=SOFT, font=font(13), anchor="mm")
        return
    small = fit_within(image, THUMB)
    card.paste(small, (left + (THUMB - small.width) // 2, top + (THUMB - small.height) // 2))


def _cut(words: str, size: int, width: int) -> str:
    """`words`, or as many of their first characters as fit `width` pixels."""
    if font(size).getlength(words) <= width:
        return words
    fitting = next(end for end in range(len(words), -1, -1) if font(size).getlength(words[:end] + "…") <= width or end == 0)
    return words[:fitting] + "…"
