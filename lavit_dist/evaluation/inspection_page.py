"""An inspection as an HTML page that needs nothing outside itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from lavit_dist.data.quarantine import Quarantined
from lavit_dist.evaluation.inspection import InspectedImage, Inspection
from lavit_dist.evaluation.inspection_panels import brightest_loss, maps, patch_row
from lavit_dist.evaluation.inspection_words import describe_codes, describe_image, explain_codes, summary
from lavit_dist.evaluation.panels import enlarged
from lavit_dist.generation.contact_sheet import dim_dropped
from lavit_dist.observe.report.charts import histogram, usage_chart
from lavit_dist.observe.report.page import Chart, render_template

SIDE, IDS = 224, 640
"""Pixels of a map, and of the picture beneath the ids."""
THUMB, BETWEEN = 84, 6
MOST_REFUSED = 100
QUALITY = 88
"""Of WebP, whose losses can't be seen there; PNG would make the page ten times as large."""


def inspection_page(
    inspection: Inspection,
    *,
    title: str,
    subtitle: str,
    codes: Sequence[int],
    patches_per_code: int,
    context: int,
    refused: Sequence[Quarantined],
) -> str:
    """Every shown picture, the `codes` with `patches_per_code` patches each, and what could not be read."""
    usage = inspection.usage
    brightest = brightest_loss(inspection)
    tokens = [usage.tokens.count(number) for number in range(len(inspection.images[0].keep_mask) + 1)]
    return render_template(
        "inspection.html.j2",
        {
            "title": title,
            "subtitle": subtitle,
            "figures": summary(inspection),
            "grid": round(len(inspection.images[0].keep_mask) ** 0.5),
            "digits": len(str(usage.codebook_size - 1)),
            "rebuilt": inspection.images[0].rebuilt is not None,
            "images": [_image(image, brightest) for image in inspection.images],
            "explained": set(codes),
            "codes_note": explain_codes(inspection),
            "codes": [
                {
                    "code": words.code,
                    "uses": words.uses,
                    "likeness": words.likeness,
                    "patches": _uri(patch_row(inspection, words.code, patches_per_code, context, THUMB, BETWEEN)),
                }
                for words in describe_codes(inspection, list(codes))
            ],
            "charts": [
                Chart(histogram(tokens, x="tokens", y="pictures"), f"Tokens of {len(usage.tokens):,} pictures"),
                Chart(
                    usage_chart(usage.counts.tolist(), x="codes, most used first", y="uses"),
                    f"Use of the {usage.codebook_size:,} codes",
                ),
            ],
            "refused": refused[:MOST_REFUSED],
            "not_listed": len(refused[MOST_REFUSED:]),
        },
    )


def _image(image: InspectedImage, brightest: float) -> dict[str, Any]:
    grid = round(len(image.keep_mask) ** 0.5)
    ids = []
    for patch, code in zip(image.keep_mask.nonzero().flatten().tolist(), image.codes.tolist(), strict=True):
        row, column = divmod(patch, grid)
        words = f"keep probability {image.keep_probability[patch]:.2f}, loss {image.errors[patch]:.3f}"
        ids.append({"code": code, "row": row + 1, "column": column + 1, "words": words})
    return {
        "name": image.name,
        "words": describe_image(image),
        "kept": _uri(dim_dropped(enlarged(image.picture, IDS), image.keep_mask)),
        "ids": ids,
        "maps": [(name, _uri(picture)) for name, picture in maps(image, brightest, SIDE)],
    }


def _uri(picture: Image.Image | None) -> str:
    if picture is None:
        return ""
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
