"""Settings of the report."""

from __future__ import annotations

from lavit_dist.config.base import config
from lavit_dist.errors import check


@config
class ReportConfig:
    """Renders what a chain of stages left in its folder as one HTML file."""

    run_dir: str
    """Folder of the chain, with a folder per stage; report.html goes there."""
    num_shown: int = 24
    """Pictures, captions, reconstructions and masks to show, of each at most so many."""

    def validate(self) -> None:
        check(self.num_shown >= 1, f"num_shown {self.num_shown} must be at least 1.")
