"""Settings of the tokenizer inspector."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from lavit_dist.config.base import Seed, config
from lavit_dist.config.generate import SamplingConfig
from lavit_dist.config.images import MAX_PIXELS
from lavit_dist.errors import check


@config
class InspectTokenizerConfig:
    """Shows what a visual tokenizer makes of pictures: patches, ids, what an id stands for, and what comes back."""

    tokenizer: str | None = None
    """Folder that holds visual_tokenizer/, such as train_tokenizer's RUN_DIR/model; None takes the one beside the decoder."""
    decoder: str | None = None
    """Folder of a trained pixel decoder (train_decoder's RUN_DIR/model), which paints the pictures back from their tokens."""
    pairs: str | None = None
    """Folder of tars with further pictures, in which patches with the same id are looked for; None looks in those that are named."""
    out: str = "inspected"
    """Folder of index.html and page.png."""
    selection: Literal["gumbel", "argmax"] = "gumbel"
    """How patches are chosen, as in pretokenize: at random by the selector's probabilities, or the most probable."""
    seed: Seed = 0
    """Seed of patch selection and of the diffusion's starting noise."""
    num_images: PositiveInt = 24
    """Pictures to show, the first of those that can be used."""
    num_reference: NonNegativeInt = 300
    """Further pictures to look for patches in: the rest of those that are named, then those of `pairs`."""
    num_codes: PositiveInt = 24
    """Codes to show patches of: those that occur in most pictures."""
    codes: tuple[NonNegativeInt, ...] = ()
    """Codes to show patches of instead."""
    patches_per_code: PositiveInt = 12
    """Patches to show of each, from as many pictures as possible."""
    context: Annotated[int, Field(ge=0, le=16)] = 1
    """Patches around each that are shown with it, on every side."""
    num_inference_steps: PositiveInt = 25
    """The decoder's DDIM steps (25 in the released code)."""
    decoder_guidance_scale: Annotated[float, Field(ge=1)] = 1.5
    """Weight of the features against none in the painted noise (1.5 in the released evaluation); 1 turns guidance off."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Type of the U-Net's matrix products (autocast)."""
    batch_size: PositiveInt = 32
    """Pictures per forward pass."""
    max_pixels: PositiveInt = MAX_PIXELS
    """Largest picture that is decoded, pixels (Pillow's own limit); larger ones are passed over."""
    num_threads: PositiveInt | None = None
    """CPU threads; None leaves torch's choice."""

    @property
    def sampling(self) -> SamplingConfig:
        """How pictures are painted."""
        return SamplingConfig(
            seed=self.seed,
            num_inference_steps=self.num_inference_steps,
            decoder_guidance_scale=self.decoder_guidance_scale,
            precision=self.precision,
            batch_size=self.batch_size,
        )

    def validate(self) -> None:
        check(
            self.tokenizer is not None or self.decoder is not None,
            "Neither tokenizer nor decoder is set; give tokenizer=FOLDER, or decoder=FOLDER, which holds its tokenizer.",
        )
