"""What the figures of a tokenizer's training say is wrong with it: what was seen, why, and which settings to change."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lavit_dist.config.tokenizer_health import CollapseConfig, Kind

Figures = Mapping[str, NDArray[np.float64]]
"""The values of each metric over a window of steps, oldest first; not a number where a step didn't report it."""
LATE = 10
"""A gradient is judged by the last 1/10 of the window, and at least by FEWEST_LATE steps."""
FEWEST_LATE = 5
FEWEST_GAPS = 3
"""Batches that must have been reconstructed with and without the quantizer before the two are compared."""
SMALLEST_GAP = 0.02
"""Difference of the two losses below which their ratio says nothing."""
PINNED = 0.02
"""Within this distance of 0 or 1 a keep ratio has no choice left in it."""
USED = "train with codebook.learning=ema, codebook.initialisation=kmeans and codebook.revive_below=0.1"
"""What keeps codes in use."""


@dataclass(frozen=True)
class Setup:
    """What the figures are measured against."""

    codebook_size: int
    keep_ratio: float
    """The target of the mean over a batch."""
    usage_window_steps: int
    """Steps over which a code counts as used."""
    images_may_differ: bool = True
    """Whether images may keep different numbers of patches; False where each has to meet the target."""


@dataclass(frozen=True)
class Evidence:
    """All that a run has shown since the last change of what it computes."""

    window: Figures
    gaps: NDArray[np.float64]
    """[report, 2]: the loss with and without the quantizer on the same images, for the newest batches that were asked."""
    best_codes_used: float
    """The best mean of `codes_used` over any window so far."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, as one sentence without its full stop."""

    kind: Kind
    sentence: str


def diagnose(evidence: Evidence, setup: Setup, limits: CollapseConfig) -> list[Finding]:
    """All that is wrong, at most one finding of each kind that isn't ignored."""
    found = []
    for kind, look in SYMPTOMS.items():
        sentence = None if kind in limits.ignore else look(evidence, setup, limits)
        if sentence is not None:
            found.append(Finding(kind, sentence))
    return found


def _codebook(evidence: Evidence, setup: Setup, limits: CollapseConfig) -> str | None:
    """Few codes used, fewer and fewer, or a few that take nearly every token."""
    size = setup.codebook_size
    used, tokens = _mean(evidence.window, "codes_used"), _tokens_per_step(evidence.window)
    usable = -math.expm1(tokens * setup.usage_window_steps * math.log1p(-1 / size)) if size > 1 else 1.0
    told = tokens * setup.usage_window_steps >= size
    if told and used < limits.min_codes_used * usable:
        loss = _mean(evidence.window, "reconstruction_loss")
        return (
            f"Only {used:.1%} of the {size:,} codes are in use and the reconstruction loss is {loss:.3f}: the codebook has collapsed, which is how runs stall near 0.3, where the authors reach 0.18;"
            f" {USED}, and let a phase without the quantizer come before"
        )
    lost = evidence.best_codes_used - used
    if told and lost > limits.max_codes_lost and _falls(evidence.window["codes_used"]):
        return (
            f"The share of the {size:,} codes in use has fallen from {evidence.best_codes_used:.1%} to {used:.1%} and goes on falling:"
            f" codes die faster than they are revived; {USED}, or a larger revive_below if it is so already"
        )
    perplexity, attainable = _mean(evidence.window, "perplexity"), float(np.minimum(size, tokens))
    if perplexity < limits.min_perplexity * attainable:
        return (
            f"The codes of a step have a perplexity of {perplexity:.1f}, where its {tokens:,.0f} tokens and {size:,} codes allow"
            f" {attainable:,.0f}: a few codes take nearly every token; {USED}, and raise kmeans_batches, so that the first codes lie"
            " where the vectors are"
        )
    return None


def _quantizer_gap(evidence: Evidence, setup: Setup, limits: CollapseConfig) -> str | None:
    """A loss that the quantizer has made much worse: the stall near 0.3."""
    if len(evidence.gaps) < FEWEST_GAPS:
        return None
    quantized, continuous = evidence.gaps.mean(0).tolist()
    if not quantized > max(limits.max_quantizer_gap * continuous, continuous + SMALLEST_GAP):
        return None
    used = _mean(evidence.window, "codes_used")
    share = "" if math.isnan(used) else f" and {used:.0%} of the codes in use"
    return (
        f"The reconstruction loss is {quantized:.3f} with the quantizer and {continuous:.3f} without it, {quantized / continuous:.2f}"
        f" times as much{share}: the codes don't follow the vectors, which is how runs stall near 0.3; lower codebook.decay so that codes"
        " follow faster, set commitment_cost=0.25 to hold vectors to them, or raise kmeans_batches, and codebook.size if all are in use"
    )


def _selection(evidence: Evidence, setup: Setup, limits: CollapseConfig) -> str | None:
    """A selector that keeps all or nothing, far too many or too few, or the same number of patches of every image."""
    kept, target = _mean(evidence.window, "keep_ratio"), setup.keep_ratio
    if kept < PINNED or kept > 1 - PINNED:
        return (
            f"The selector keeps {kept:.1%} of the patches, where {target:.1%} are wanted: it has run into one of its ends and gets no"
            " gradient there; start again with a larger rate.weight and a smaller optimizer.learning_rate"
        )
    if abs(kept - target) > limits.max_keep_ratio_error:
        return (
            f"The selector keeps {kept:.1%} of the patches, where {target:.1%} are wanted: the rate term is too weak to hold it, or it"
            " has been frozen before it got there; raise rate.weight, or set calibrate_selector=true in the phase that freezes it"
        )
    spread = _mean(evidence.window, "keep_ratio_std")
    if setup.images_may_differ and spread < limits.min_keep_ratio_std:
        return (
            f"Every image keeps the same share of its patches, {kept:.1%} with a standard deviation of {spread:.2%}: the selector goes by"
            " the place of a patch and not by what is on it; set selector_signal=reconstruction_error in the phase that trains it, and"
            " rate.per=batch"
        )
    return None


def _gradient(evidence: Evidence, setup: Setup, limits: CollapseConfig) -> str | None:
    """A gradient norm that has grown many times over and stays there; a single outlier is no matter."""
    norms = _finite(evidence.window, "grad_norm")
    late = max(FEWEST_LATE, len(norms) // LATE)
    if len(norms) < 2 * late:
        return None
    before, now = float(np.median(norms[:-late])), float(norms[-late:].min())
    if now <= limits.max_gradient_growth * before:
        return None
    return (
        f"The gradient norm has been {now:.3g} or more for {late} steps, {now / before if before else math.inf:.0f} times its median of"
        f" {before:.3g} before: the steps are too long for the loss; lower optimizer.learning_rate, lengthen optimizer.warmup_steps, or"
        " set optimizer.gradient_clipping=1.0"
    )


def _revival(evidence: Evidence, setup: Setup, limits: CollapseConfig) -> str | None:
    """Codes that are moved again and again, before a vector can choose them twice."""
    size = setup.codebook_size
    revived = _mean(evidence.window, "codes_revived")
    if not revived > limits.max_codes_revived * size:
        return None
    hits = _tokens_per_step(evidence.window) / size
    return (
        f"{revived:,.0f} of the {size:,} codes ({revived / size:.0%}) are revived at every step, where a step has {hits:.2g} tokens per"
        " code: they are moved away before they can settle; lower codebook.revive_below, raise codebook.decay so that a code is given"
        " longer, or raise global_batch_size"
    )


SYMPTOMS: Mapping[Kind, Callable[[Evidence, Setup, CollapseConfig], str | None]] = {
    "codebook": _codebook,
    "quantizer_gap": _quantizer_gap,
    "selection": _selection,
    "gradient": _gradient,
    "revival": _revival,
}


def _finite(window: Figures, name: str) -> NDArray[np.float64]:
    values = window.get(name, np.empty(0))
    return values[np.isfinite(values)]


def _mean(window: Figures, name: str) -> float:
    """The mean of what was reported; not a number, which is on neither side of any limit, where nothing was."""
    values = _finite(window, name)
    return float(values.mean()) if len(values) else math.nan


def _tokens_per_step(window: Figures) -> float:
    return _mean(window, "images") * _mean(window, "tokens_per_image")


def _falls(values: NDArray[np.float64]) -> bool:
    """Whether each quarter of the window lies below the one before."""
    quarters = [float(quarter.mean()) for quarter in np.array_split(values[np.isfinite(values)], 4)]
    return all(later < earlier for earlier, later in pairwise(quarters))
