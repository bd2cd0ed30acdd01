"""What is watched while a visual tokenizer trains, how often, and what counts as a collapse."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from lavit_dist.config.base import config
from lavit_dist.errors import check

Kind = Literal["codebook", "quantizer_gap", "selection", "gradient", "revival"]
"""What can be found wrong: codes that nothing uses; a quantizer that loses too much; a selector that has stopped choosing; a gradient
that grows without end; codes that are moved faster than they can settle."""
Share = Annotated[float, Field(ge=0, le=1)]


@config
class CollapseConfig:
    """When a run counts as collapsing, and what is done then. Means are taken over `window_steps`."""

    action: Literal["warn", "stop", "off"] = "warn"
    """`warn` logs each finding; `stop` ends the run at the first one, checkpoints stay; `off` looks for nothing."""
    ignore: tuple[Kind, ...] = ()
    """Kinds of findings that are not looked for."""
    grace_steps: PositiveInt = 500
    """Steps in which nothing is judged: after the start, after a resumption, and after the quantizer comes on."""
    window_steps: PositiveInt = 100
    """Steps over which figures are averaged."""
    repeat_steps: PositiveInt = 1000
    """Steps after which a finding that lasts is logged again."""
    min_codes_used: Share = 0.5
    """Smallest share of the codes that may be in use, of those that so many tokens could use. Runs that stall at a loss of 0.3 use 0.12
    of theirs (fewer than 2,000 of 16,384, official issue 3); healthy ones use more than 0.9."""
    max_codes_lost: Share = 0.25
    """Largest fall of that share from its best that is still going on."""
    min_perplexity: Share = 0.02
    """Smallest perplexity of a step's codes, as a share of the codes or of the step's tokens, whichever are fewer. A few codes that take
    nearly every token make it tiny, however many others are used once."""
    max_quantizer_gap: Annotated[float, Field(gt=1)] = 1.3
    """Largest reconstruction loss, as a multiple of that without the quantizer on the same images. Runs that stall: 0.3 against 0.22
    (official issue 3), which is 1.36; a healthy codebook costs a few hundredths."""
    max_keep_ratio_error: Share = 0.1
    """Largest distance of the mean keep ratio from its target."""
    min_keep_ratio_std: Share = 0.005
    """Smallest standard deviation of the keep ratio over images (1.3 of 256 patches); chance alone makes 0.03 of it at a third of 256."""
    max_gradient_growth: Annotated[float, Field(gt=1)] = 10.0
    """Largest gradient norm, before clipping, that may last for a tenth of the window, as a multiple of the median before it."""
    max_codes_revived: Share = 0.2
    """Largest share of the codes that may be revived per step, on average."""

    def validate(self) -> None:
        check(
            self.window_steps >= 10,
            f"health.collapse.window_steps {self.window_steps} is too short to tell a collapse from noise; give at least 10.",
        )


@config
class TokenizerHealthConfig:
    """What is watched while a visual tokenizer trains."""

    collapse: CollapseConfig = CollapseConfig()
    usage_window_steps: PositiveInt = 100
    """Steps over which a code counts as used, for `codes_used`."""
    continuous_every_steps: NonNegativeInt = 50
    """Steps between batches that are also reconstructed without the quantizer, for `continuous_reconstruction_loss`; 0 never does."""
    sheet_every_steps: NonNegativeInt = 1000
    """Steps between sample sheets, RUN_DIR/sheets/step-00001000.png; 0 draws none."""
    sheet_images: PositiveInt = 6
    """Images on a sheet, the same ones on each."""
    sheet_bank_images: PositiveInt = 64
    """Further images, of whose patches nearest-neighbour reconstructions are made."""
