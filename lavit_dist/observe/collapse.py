"""Watches a tokenizer's training for collapse, and warns or stops with the cause and the remedy."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping

import numpy as np

from lavit_dist.config.tokenizer_health import CollapseConfig
from lavit_dist.engine.loop import Callback
from lavit_dist.errors import UserError
from lavit_dist.observe.symptoms import FEWEST_GAPS, Evidence, Setup, diagnose
from lavit_dist.parallel.distributed import rank

logger = logging.getLogger(__name__)
METRICS = (
    "reconstruction_loss",
    "perplexity",
    "codes_used",
    "codes_revived",
    "keep_ratio",
    "keep_ratio_std",
    "tokens_per_image",
    "grad_norm",
    "images",
)


class CollapseDetector(Callback):
    """Judges every step by the window of steps that ends with it. Metrics are equal on all ranks, and so are the decisions.

    It begins anew, with a period of grace, when the quantizer comes on and when a run is resumed.
    """

    def __init__(self, config: CollapseConfig, setup: Setup) -> None:
        self.config = config
        self.setup = setup
        self.reported: dict[str, int] = {}
        """The step at which each kind of finding was logged last."""
        self._begin()

    def on_start(self, start_step: int, total_steps: int) -> None:
        self._begin()

    def after_step(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.config.action == "off":
            return
        quantizing = bool(metrics.get("quantizing", 0))
        if quantizing != self.quantizing:
            self._begin(quantizing)
        self._watch(metrics)
        if self.steps >= self.config.grace_steps + self.config.window_steps:
            self._judge(step)

    def _begin(self, quantizing: bool = False) -> None:
        self.quantizing = quantizing
        self.steps = 0
        self.history: dict[str, deque[float]] = {name: deque(maxlen=self.config.window_steps) for name in METRICS}
        self.gaps: deque[tuple[float, float]] = deque(maxlen=FEWEST_GAPS)
        self.best_codes_used = 0.0
        self.reported.clear()

    def _watch(self, metrics: Mapping[str, float]) -> None:
        self.steps += 1
        for name, values in self.history.items():
            values.append(metrics.get(name, np.nan))
        if self.quantizing and "continuous_reconstruction_loss" in metrics and self.steps > self.config.grace_steps:
            self.gaps.append((metrics["reconstruction_loss"], metrics["continuous_reconstruction_loss"]))

    def _judge(self, step: int) -> None:
        window = {name: np.array(values) for name, values in self.history.items()}
        if np.isfinite(window["codes_used"]).any():
            self.best_codes_used = max(self.best_codes_used, float(np.nanmean(window["codes_used"])))
        findings = diagnose(Evidence(window, np.array(self.gaps), self.best_codes_used), self.setup, self.config)
        for finding in findings:
            if self.config.action == "stop":
                cause = finding.sentence[0].lower() + finding.sentence[1:]
                raise UserError(
                    f"Training stops after step {step}, as health.collapse.action=stop asks: {cause}; the checkpoints stay."
                )
            if step - self.reported.get(finding.kind, -self.config.repeat_steps) >= self.config.repeat_steps:
                self.reported[finding.kind] = step
                if rank() == 0:
                    logger.warning("step %d: %s.", step, finding.sentence)
