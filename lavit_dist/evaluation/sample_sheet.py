"""What a tokenizer makes of a few pictures, on one sheet: kept patches, and the features that come back from their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lavit_dist.data.image import to_image
from lavit_dist.evaluation.panels import (
    ERROR_COLOURS,
    INK,
    PAPER,
    SOFT,
    Canvas,
    colour_bar,
    enlarged,
    figure_picture,
    font,
    heat_map,
)
from lavit_dist.evaluation.patch_bank import PatchBank
from lavit_dist.generation.contact_sheet import dim_dropped
from lavit_dist.models.autoencoder import FeatureAutoencoder
from lavit_dist.models.selector import keyed_gumbel_noise, select_some
from lavit_dist.models.tokenizer_losses import reconstruction_error
from lavit_dist.models.visual_tokenizer import VisualTokenizer
from lavit_dist.observe.report.charts import histogram_figure

SIDE, MARGIN, BETWEEN = 208, 16, 8
"""Pixels of a picture on the sheet, of the sheet's edge, and between two pictures."""
BANK_PATCHES = 4096
NOISE_SEED = 0
BRIGHTEST = 0.99
"""Share of the errors below the brightest colour."""


COLUMNS = ("image", "kept patches", "rebuilt from the tokens", "rebuilt from the features", "loss per patch")
REBUILT = "rebuilt: every patch is that patch of other images whose feature is nearest; from the image's own features is the best there can be"


@dataclass(frozen=True)
class Seen:
    """What a tokenizer made of some pictures."""

    keep_mask: Tensor
    """[image, patch] bools."""
    features: Tensor
    """Reconstructed features [image, patch, width]."""


class SampleSheet:
    """Pictures [image, 3, H, W] that are drawn again and again while a tokenizer learns, with their features, which it doesn't change."""

    def __init__(self, tokenizer: VisualTokenizer, pixel_values: Tensor, bank_pixels: Tensor) -> None:
        """`bank_pixels` [image, 3, H, W] are other pictures, of whose patches the reconstructions are put together."""
        with undisturbed(tokenizer):
            self.pixel_values = pixel_values
            self.features = _encode(tokenizer, pixel_values)
            features, images = _encode(tokenizer, bank_pixels), torch.arange(len(bank_pixels))
        self.bank = PatchBank.draw(bank_pixels, features, images, BANK_PATCHES, torch.Generator().manual_seed(0))
        self.pictures = [to_image(picture) for picture in pixel_values]
        self.attainable = [to_image(picture) for picture in self.bank.mosaic(self.features)]

    def draw(self, tokenizer: VisualTokenizer, title: str, *, quantize: bool, tokens: Sequence[int] = ()) -> Image.Image:
        """The sheet under `title`; `tokens` are how many images had 0, 1, … tokens of late, if known."""
        with undisturbed(tokenizer):
            seen = look(tokenizer, self.features, quantize=quantize)
        return self.arrange(seen, title, tokens)

    def arrange(self, seen: Seen, title: str, tokens: Sequence[int] = ()) -> Image.Image:
        """`draw`, of what has been seen already."""
        errors = reconstruction_error(self.features, seen.features).cpu()
        kept = seen.keep_mask.cpu()
        brightest = float(torch.quantile(errors.flatten(), BRIGHTEST))
        rebuilt = [to_image(picture) for picture in self.bank.mosaic(seen.features)]
        canvas = Canvas(2 * MARGIN + 5 * SIDE + 4 * BETWEEN, MARGIN)
        canvas.words(title, 20)
        canvas.words(_summary(kept, errors), 14, SOFT)
        canvas.words(REBUILT, 14, SOFT, gap=10)
        canvas.add(_header(canvas.width, brightest), 4)
        for place, picture in enumerate(self.pictures):
            panels = [
                enlarged(picture, SIDE),
                dim_dropped(enlarged(picture, SIDE), kept[place]),
                enlarged(rebuilt[place], SIDE),
                enlarged(self.attainable[place], SIDE),
                heat_map(picture, errors[place], 0, brightest, ERROR_COLOURS, SIDE),
            ]
            canvas.pictures(panels, gap=2, between=BETWEEN)
            canvas.words(_describe(kept[place], errors[place]), 13, SOFT, gap=8)
        if sum(tokens):
            chart = histogram_figure(tokens, x=f"tokens of the last {sum(tokens):,} images", y="images")
            canvas.pictures([figure_picture(chart, canvas.width // 2)], gap=0, between=0)
        return canvas.picture()


def look(tokenizer: VisualTokenizer, features: Tensor, *, quantize: bool) -> Seen:
    """Patch features [image, patch, width] through the tokenizer and back, with the same selection noise at each call."""
    keys = [str(place) for place in range(len(features))]
    noise = keyed_gumbel_noise(keys, features.shape[1], NOISE_SEED).to(features.device)
    if quantize:
        tokenized = tokenizer.tokenize_features(features, noise)
        return Seen(tokenized.keep_mask, tokenizer.reconstruct(tokenized.codes))
    keep_mask = select_some(tokenizer.selector(features), noise)
    return Seen(keep_mask, FeatureAutoencoder(tokenizer)(features, keep_mask=keep_mask, quantize=False).features)


@contextmanager
def undisturbed(tokenizer: VisualTokenizer) -> Iterator[None]:
    """Within it the tokenizer is in evaluation mode and nothing is recorded for gradients; afterwards it is as it was."""
    modes = {module: module.training for module in tokenizer.modules()}
    tokenizer.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _encode(tokenizer: VisualTokenizer, pixel_values: Tensor, batch_size: int = 16) -> Tensor:
    weight = next(tokenizer.encoder.parameters())
    return torch.cat([tokenizer.encode(batch.to(weight.device, weight.dtype)) for batch in pixel_values.split(batch_size)])


def _summary(kept: Tensor, errors: Tensor) -> str:
    parts = [f"{errors[mask].mean():.3f} where {name}" for name, mask in (("kept", kept), ("dropped", ~kept)) if mask.any()]
    return (
        f"{kept.float().mean():.1%} of {kept.shape[1]} patches kept   ·   loss (1 - cosine) {errors.mean():.3f}: {', '.join(parts)}"
    )


def _describe(kept: Tensor, errors: Tensor) -> str:
    return f"{int(kept.sum())} tokens   ·   loss {errors.mean():.3f}"


def _header(width: int, brightest: float) -> Image.Image:
    """The names of the columns, and the scale of the last."""
    header = Image.new("RGB", (width, 20), PAPER)
    draw = ImageDraw.Draw(header)
    for column, name in enumerate(COLUMNS):
        draw.text((MARGIN + column * (SIDE + BETWEEN), 1), name, fill=INK, font=font(13))
    right = MARGIN + 5 * SIDE + 4 * BETWEEN
    bar, end = colour_bar(ERROR_COLOURS, 50, 10), f"{brightest:.2f}"
    space = round(draw.textlength(end, font=font(12)))
    header.paste(bar, (right - space - 4 - bar.width, 6))
    draw.text((right - space, 2), end, fill=SOFT, font=font(12))
    draw.text((right - space - bar.width - 16, 2), "0", fill=SOFT, font=font(12))
    return header
