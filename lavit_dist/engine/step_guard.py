"""Which steps went wrong, and when a run has to go back: gradients that aren't finite, and losses that are spikes."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from lavit_dist.config.training import FaultsConfig


class StepGuard:
    """Judges each step by its metrics, which all ranks have alike, so that they judge alike. Its state is small and plain."""

    def __init__(self, config: FaultsConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.spike_window)
        """Of the last steps that were well."""
        self.bad = 0
        """How many steps in a row went wrong until now."""
        self.skipped = 0
        """How many steps weren't taken since the run began, because their gradient wasn't finite."""
        self.roll_backs = 0
        """How often the run has gone back."""
        self.phase = 0.0
        """The part of the training that the losses are of: those of another are sums of other terms."""

    def judge(self, metrics: Mapping[str, float]) -> str:
        """Takes in a step's metrics; what is wrong with it, as a clause, or nothing when it is well."""
        phase = metrics.get("phase", 0.0)
        if phase != self.phase:
            self.phase = phase
            self.losses.clear()
        problem = self._problem(metrics)
        if not problem:
            self.bad = 0
            self.losses.append(metrics.get("loss", 0.0))
        else:
            self.bad += 1
        return problem

    @property
    def must_go_back(self) -> bool:
        """Whether too many steps in a row went wrong."""
        return self.bad >= self.config.bad_steps

    def went_back(self) -> None:
        """Begins anew at an earlier step."""
        self.bad = 0
        self.roll_backs += 1
        self.losses.clear()

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        counts = {"bad": self.bad, "skipped": self.skipped, "roll_backs": self.roll_backs}
        return {"losses": list(self.losses), "phase": self.phase, **counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave; a window that is shorter now keeps the newest losses."""
        self.losses = deque(state["losses"], maxlen=self.config.spike_window)
        self.phase = state["phase"]
        self.bad, self.skipped, self.roll_backs = state["bad"], state["skipped"], state["roll_backs"]

    def _problem(self, metrics: Mapping[str, float]) -> str:
        for name in ("grad_norm", "loss"):
            if not math.isfinite(metrics.get(name, 0.0)):
                self.skipped += name == "grad_norm"
                return f"its {name} is {metrics[name]}"
        deviations = self.config.spike_deviations
        if deviations and len(self.losses) == self.losses.maxlen:
            mean, deviation = statistics.fmean(self.losses), statistics.pstdev(self.losses)
            if metrics["loss"] > mean + deviations * deviation:
                return f"its loss {metrics['loss']:.4g} is a spike above {mean:.4g} ± {deviation:.2g}"
        return ""
