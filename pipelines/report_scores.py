"""The lines of the report's score table: each score with what is asked of the quickstart and how it is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lavit_dist.observe.report.page import Score

CAPTIONS, PICTURES, RECONSTRUCTIONS = 0.8, 0.4, 0.6
"""Shares of held-out images whose main object must have the right colour and shape."""
KEEP_RATIO, KEEP_RATIO_TOLERANCE = 1 / 3, 0.03
CODES_USED = 0.8
TOKENS_AND_OBJECTS = 0.5


def scores_note(results: Mapping[str, Any]) -> str:
    """What the scores are about."""
    scores = results["scores"]
    if scores is None:
        return (
            "Measured on pairs without attributes to check against, so that captions and pictures are to be judged by eye, below."
            " Sizes and steps are those of a short demonstration."
        )
    return (
        "Held-out images are scenes that training never saw, in the default set of combinations of attributes that no training pair has."
        " Pictures are judged by a probe: a small classifier over the vision tower's features, trained on real training images. On"
        f" {max(len(results['captions']), len(results['text_to_image']))} real held-out"
        f" images the probe itself names colour and shape of the main object right in {_percent(scores['probe']['all'])}."
    )


def score_rows(results: Mapping[str, Any]) -> list[Score]:
    """The table, line by line."""
    tokens, codes, scores = results["tokens"], results["codes"], results["scores"]
    rows = [] if scores is None else _procedural_rows(results)
    images = sum(split["images"] for split in tokens.values())
    keep_ratio = sum(split["images"] * split["keep_ratio"] for split in tokens.values()) / images
    of_splits = "; ".join(
        f"{split['images']} {name}: {split['keep_ratio']:.3f}, {split['tokens_mean']:.1f} tokens, standard deviation"
        f" {split['tokens_std']:.1f}"
        for name, split in (("for training", tokens["train"]), ("held out", tokens["heldout"]))
    )
    rows.append(
        Score(
            "Share of patches kept",
            f"{keep_ratio:.3f}",
            f"{KEEP_RATIO:.3f} ± {KEEP_RATIO_TOLERANCE}",
            abs(keep_ratio - KEEP_RATIO) <= KEEP_RATIO_TOLERANCE,
            f"mean over {images} images ({of_splits})",
        )
    )
    asked = scores is not None  # a set of few pairs can't use many codes
    rows.append(
        Score(
            "Codes in use",
            _percent(codes["used"]),
            f"≥ {_percent(CODES_USED)}" if asked else "",
            codes["used"] >= CODES_USED if asked else None,
            f"of {len(codes['counts'])}, at least once in {results['tokens']['train']['images']} training images;"
            f" perplexity {codes['perplexity']:.0f}",
        )
    )
    return rows


def _procedural_rows(results: Mapping[str, Any]) -> list[Score]:
    scores, attempts = results["scores"], results["repetitions"]
    captions, single = scores["captions"], scores["single"]
    candidates, paintings = attempts["num_candidates"], attempts["num_paintings"]
    drawn, rebuilt = len(results["text_to_image"]), len(results["reconstruction"])
    return [
        _share_row(
            "Captions: colour and shape of the main object right",
            captions["all"],
            CAPTIONS,
            f"{len(results['captions'])} held-out images; colour {_percent(captions['colour'])}, shape"
            f" {_percent(captions['shape'])}; position {_percent(captions['position'])} of {captions['position_stated']} that state it,"
            f" count {_percent(captions['count'])} of {captions['count_stated']}."
            + _choice(attempts["num_tokenizations"] > 1, f"{attempts['num_tokenizations']} tokenizations", single["captions"]),
        ),
        _judged_row(
            "Drawn pictures: the same",
            scores["text_to_image"],
            scores["probe"],
            PICTURES,
            f"{drawn} held-out prompts",
            _choice(candidates * paintings > 1, f"{candidates} drafts and {paintings} paintings", single["text_to_image"]),
        ),
        _judged_row(
            "Reconstructions: the same",
            scores["reconstruction"],
            scores["probe"],
            RECONSTRUCTIONS,
            f"{rebuilt} held-out images",
            _choice(paintings > 1, f"{paintings} paintings", single["reconstruction"]),
        ),
        Score(
            "Tokens grow with objects",
            f"{scores['tokens_and_objects']:.2f}",
            f"≥ {TOKENS_AND_OBJECTS}",
            scores["tokens_and_objects"] >= TOKENS_AND_OBJECTS,
            "Spearman's rank correlation of an image's tokens and its number of objects, all images",
        ),
    ]


def _choice(several: bool, attempts: str, single: Mapping[str, float]) -> str:
    """How the best was chosen, and what a single attempt scores."""
    return f" The best of {attempts}, by the models' own judgement; a single attempt: {_percent(single['all'])}." if several else ""


def _judged_row(name: str, shares: Mapping[str, float], probe: Mapping[str, float], target: float, what: str, choice: str) -> Score:
    note = (
        f"{what}; colour {_percent(shares['colour'])}, shape {_percent(shares['shape'])}.{choice}"
        f" The probe on real renders: {_percent(probe['all'])} (colour {_percent(probe['colour'])}, shape {_percent(probe['shape'])})"
    )
    return _share_row(name, shares["all"], target, note)


def _share_row(name: str, share: float, target: float, note: str) -> Score:
    return Score(name, _percent(share), f"≥ {_percent(target)}", share >= target, note)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
