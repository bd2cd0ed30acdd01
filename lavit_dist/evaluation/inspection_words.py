"""What an inspection says in words and figures, for its page and its picture alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lavit_dist.evaluation.inspection import InspectedImage, Inspection


@dataclass(frozen=True)
class CodeWords:
    """What is said about one code."""

    code: int
    uses: str
    likeness: str


def summary(inspection: Inspection) -> list[tuple[str, str]]:
    """Names and values of the figures over all pictures."""
    usage = inspection.usage
    used, perplexity = usage.use()
    tokens = np.array(usage.tokens)
    return [
        ("pictures", f"{len(tokens):,}"),
        ("tokens per picture", f"{tokens.mean():.1f} ± {tokens.std():.1f}, {tokens.min()} to {tokens.max()}"),
        ("different ids per picture", f"{usage.different():.1f}"),
        ("patches kept", f"{inspection.keep_ratio:.1%}"),
        ("loss (1 - cosine)", f"{inspection.loss:.3f}"),
        ("codes used", f"{round(used * usage.codebook_size):,} of {usage.codebook_size:,} by {tokens.sum():,} tokens"),
        ("perplexity", f"{perplexity:,.0f}"),
    ]


def describe_image(image: InspectedImage) -> str:
    """One line about a picture."""
    return (
        f"{len(image.codes)} tokens from {len(image.keep_mask)} patches, {len(image.codes.unique())} different ids, loss"
        f" {image.errors.mean():.3f}"
    )


def describe_codes(inspection: Inspection, codes: list[int]) -> list[CodeWords]:
    """What is said about each of `codes`."""
    usage = inspection.usage
    counts, pictures, likeness = usage.counts, usage.pictures, usage.likeness()
    described = []
    for code in codes:
        count, places = int(counts[code]), int(pictures[code])
        uses = (
            f"{count:,} time{'s' * (count != 1)} in {places:,} picture{'s' * (places != 1)}"
            if count
            else "not used by these pictures"
        )
        described.append(CodeWords(code, uses, f"likeness {likeness[code]:.2f}" if count > 1 else ""))
    return described


def explain_codes(inspection: Inspection) -> str:
    """What the rows of patches show."""
    return (
        "Each row shows patches, framed, that were given the same id, from as many pictures as possible. Likeness is the mean cosine of their"
        f" features to the mean of them; over all kept patches it is {inspection.usage.likeness_of_all():.2f}."
    )
