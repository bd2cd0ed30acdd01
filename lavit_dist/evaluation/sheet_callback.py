"""Draws a sample sheet every few steps of a tokenizer's training."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lavit_dist.engine.loop import Callback
from lavit_dist.engine.token_counts import TokenCounts
from lavit_dist.evaluation.sample_sheet import SampleSheet
from lavit_dist.files import write_atomically
from lavit_dist.models.visual_tokenizer import VisualTokenizer
from lavit_dist.parallel.distributed import rank

FOLDER = "sheets"


class SampleSheetCallback(Callback):
    """Writes RUN_DIR/sheets/step-00001000.png from rank 0. The run goes on as if it hadn't been watched."""

    def __init__(
        self,
        run_dir: Path,
        every_steps: int,
        tokenizer: VisualTokenizer,
        pixel_values: Tensor,
        bank_pixels: Tensor,
        token_counts: TokenCounts | None = None,
    ) -> None:
        """`pixel_values` and `bank_pixels` [image, 3, H, W] are those of `SampleSheet`; `token_counts` is filled by the trainer."""
        self.folder = run_dir / FOLDER
        self.every_steps = every_steps
        self.tokenizer = tokenizer
        self.pixel_values, self.bank_pixels = pixel_values, bank_pixels
        self.token_counts = token_counts
        self.total_steps = 0

    def on_start(self, start_step: int, total_steps: int) -> None:
        self.total_steps = total_steps
        if rank() == 0:
            self.sheet = SampleSheet(self.tokenizer, self.pixel_values, self.bank_pixels)

    def after_step(self, step: int, metrics: Mapping[str, float]) -> None:
        if rank() != 0 or (step % self.every_steps and step != self.total_steps):
            return
        quantize = bool(metrics.get("quantizing", 0))
        title = f"step {step:,} of {self.total_steps:,}, quantizer {'on' if quantize else 'off'}"
        tokens = self.token_counts.take() if self.token_counts else ()
        buffer = io.BytesIO()
        self.sheet.draw(self.tokenizer, title, quantize=quantize, tokens=tokens).save(buffer, format="PNG")
        write_atomically(self.folder / f"step-{step:08d}.png", buffer.getvalue())
