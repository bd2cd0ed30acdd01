"""The collapse detector: it names each kind of collapse once, with its remedy, and is silent about a healthy run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.config.tokenizer_health import CollapseConfig
from lavit_dist.errors import UserError
from lavit_dist.observe.collapse import CollapseDetector
from lavit_dist.observe.symptoms import Setup

Run = Iterator[dict[str, float]]
Change = Callable[[int, dict[str, float]], Mapping[str, float]]
SETUP = Setup(codebook_size=16384, keep_ratio=1 / 3, usage_window_steps=100)
QUANTIZE_FROM, STEPS = 400, 1500
LIMITS = CollapseConfig(grace_steps=150, window_steps=50, repeat_steps=500)


def healthy(seed: int = 0) -> Run:
    """A run as the authors tell of it: 0.22 without the quantizer, 0.18 in the end with it, nearly all codes in use."""
    random = np.random.default_rng(seed)
    for step in range(1, STEPS + 1):
        progress = 1 - np.exp(-step / 100)
        quantizing = step > QUANTIZE_FROM
        settling = np.exp(-(step - QUANTIZE_FROM) / 80) if quantizing else 0.0
        loss = 0.9 - 0.72 * progress + 0.15 * settling + random.normal(0, 0.004)
        metrics = {
            "loss": loss + 0.01,
            "reconstruction_loss": loss,
            "keep_ratio": 1 / 3 + 0.1 * np.exp(-step / 60) + random.normal(0, 0.02),
            "keep_ratio_std": 0.08 + random.normal(0, 0.01),
            "tokens_per_image": 85.3 + random.normal(0, 3),
            "grad_norm": 0.3 + np.exp(-step / 50) + random.exponential(0.05) + (8.0 if random.random() < 0.01 else 0.0),
            "quantizing": float(quantizing),
            "images": 2048.0,
            "seconds": 1.0,
        }
        if quantizing:
            metrics |= {
                "perplexity": 9000 + random.normal(0, 200),
                "codes_used": 0.96 - 0.3 * settling,
                "codes_revived": 5000 * settling + random.integers(0, 40),
            }
            if step % 50 == 0:
                metrics["continuous_reconstruction_loss"] = loss * 0.93
        yield metrics


def altered(change: Change, from_step: int = QUANTIZE_FROM + 1) -> Run:
    for step, metrics in enumerate(healthy(), 1):
        yield metrics | change(step, metrics) if step >= from_step else metrics


def watch(run: Run, caplog: pytest.LogCaptureFixture, limits: CollapseConfig = LIMITS, setup: Setup = SETUP) -> list[str]:
    """What the detector logs."""
    caplog.clear()
    detector = CollapseDetector(limits, setup)
    detector.on_start(0, STEPS)
    with caplog.at_level(logging.WARNING):
        for step, metrics in enumerate(run, 1):
            detector.after_step(step, metrics)
    return [record.getMessage() for record in caplog.records]


def fading(step: int, metrics: dict[str, float]) -> dict[str, float]:
    return {"codes_used": max(0.6, 0.96 - (step - QUANTIZE_FROM) / 2500)}


COLLAPSES: dict[str, tuple[Change, tuple[str, ...]]] = {
    "few codes used": (lambda *_: {"codes_used": 0.11}, ("11.0%", "16,384", "codebook.initialisation=kmeans")),
    "fewer and fewer": (fading, ("goes on falling", "codebook.revive_below")),
    "a few codes take all": (lambda *_: {"perplexity": 40.0}, ("perplexity of 40.0", "kmeans_batches")),
    "stall at 0.3": (
        lambda step, _: {"reconstruction_loss": 0.30} | ({"continuous_reconstruction_loss": 0.22} if step % 50 == 0 else {}),
        ("0.300", "0.220", "1.36 times", "codebook.decay", "commitment_cost"),
    ),
    "keeps nothing": (lambda *_: {"keep_ratio": 0.001}, ("keeps 0.1%", "33.3%", "rate.weight")),
    "keeps all": (lambda *_: {"keep_ratio": 1.0}, ("keeps 100.0%", "rate.weight")),
    "keeps too much": (lambda *_: {"keep_ratio": 0.55}, ("keeps 55.0%", "rate.weight", "calibrate_selector")),
    "images alike": (lambda *_: {"keep_ratio_std": 0.0}, ("same share", "selector_signal=reconstruction_error")),
    "gradient grows": (
        lambda step, _: {"grad_norm": 0.3 * 1.2 ** max(0, step - 700)} if step < 800 else {"grad_norm": 0.3 * 1.2**100},
        ("gradient norm", "optimizer.learning_rate"),
    ),
    "revival storm": (lambda *_: {"codes_revived": 6000.0}, ("6,000 of the 16,384", "codebook.revive_below")),
}


@pytest.mark.parametrize("name", COLLAPSES)
def test_each_collapse_is_named_with_its_figures_and_its_remedy(name: str, caplog: pytest.LogCaptureFixture) -> None:
    change, words = COLLAPSES[name]
    logged = watch(altered(change), caplog)
    assert logged
    for message in logged:
        assert all(word in message for word in words), message
        assert message.count(". ") == 0, "one sentence"
        assert message.endswith(".")


@pytest.mark.parametrize("name", COLLAPSES)
def test_a_collapse_can_stop_the_run_and_can_be_ignored(name: str, caplog: pytest.LogCaptureFixture) -> None:
    change, words = COLLAPSES[name]
    with pytest.raises(UserError, match=r"Training stops after step \d+") as caught:
        watch(altered(change), caplog, CollapseConfig(grace_steps=150, window_steps=50, action="stop"))
    assert all(word.lower() in str(caught.value).lower() for word in words)
    assert not watch(altered(change), caplog, CollapseConfig(grace_steps=150, window_steps=50, action="off"))
    everything = ("codebook", "quantizer_gap", "selection", "gradient", "revival")
    assert not watch(altered(change), caplog, CollapseConfig(grace_steps=150, window_steps=50, ignore=everything))


@given(seed=st.integers(0, 2**32 - 1), window_steps=st.integers(20, 200), grace_steps=st.integers(150, 400))
def test_a_healthy_run_raises_no_alarm(seed: int, window_steps: int, grace_steps: int) -> None:
    detector = CollapseDetector(CollapseConfig(action="stop", window_steps=window_steps, grace_steps=grace_steps), SETUP)
    detector.on_start(0, STEPS)
    for step, metrics in enumerate(healthy(seed), 1):
        detector.after_step(step, metrics)


def test_what_lasts_is_said_again_after_a_while_and_not_before(caplog: pytest.LogCaptureFixture) -> None:
    logged = watch(altered(lambda *_: {"codes_used": 0.1}), caplog)
    steps = [int(message.split()[1].rstrip(":")) for message in logged]
    assert steps == [QUANTIZE_FROM + 200, QUANTIZE_FROM + 700]


def test_nothing_is_judged_in_the_grace_after_start_resumption_and_quantizer(caplog: pytest.LogCaptureFixture) -> None:
    detector = CollapseDetector(CollapseConfig(action="stop", grace_steps=100, window_steps=50), SETUP)
    pinned = {"keep_ratio": 0.0, "reconstruction_loss": 0.5}
    detector.on_start(0, STEPS)
    for step in range(1, 150):
        detector.after_step(step, pinned)
    for step in range(150, 299):
        detector.after_step(step, pinned | {"quantizing": 1.0})
    detector.on_start(200, STEPS)
    for step in range(201, 350):
        detector.after_step(step, pinned | {"quantizing": 1.0})
    with pytest.raises(UserError, match="after step 350"):
        detector.after_step(350, pinned | {"quantizing": 1.0})


def test_codes_that_so_few_tokens_could_not_use_are_not_missed(caplog: pytest.LogCaptureFixture) -> None:
    def few(*_: int) -> dict[str, float]:
        return {"images": 2.0, "codes_used": 0.3, "perplexity": 60.0}

    assert watch(altered(few), caplog)
    assert not watch(altered(few), caplog, setup=Setup(codebook_size=16384, keep_ratio=1 / 3, usage_window_steps=20))


def test_images_that_must_be_alike_may_be(caplog: pytest.LogCaptureFixture) -> None:
    alike = Setup(codebook_size=16384, keep_ratio=1 / 3, usage_window_steps=100, images_may_differ=False)
    assert not watch(altered(lambda *_: {"keep_ratio_std": 0.0}), caplog, setup=alike)


def test_figures_that_are_absent_or_no_number_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    undefined = dict.fromkeys(("keep_ratio_std", "perplexity", "codes_used", "continuous_reconstruction_loss"), float("nan"))
    assert not watch(altered(lambda *_: undefined, from_step=1), caplog)
    assert not watch(iter([{"loss": 1.0}] * STEPS), caplog)
