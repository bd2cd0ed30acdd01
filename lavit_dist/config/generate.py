"""Settings of generation: captions, pictures, reconstructions."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lavit_dist.config.base import Seed, config
from lavit_dist.errors import check

REPETITIONS = ("num_tokenizations", "num_candidates", "num_paintings")
"""How often something random is tried, for the best to be kept."""


@config
class SamplingConfig:
    """How tokens are chosen and images painted."""

    seed: Seed = 0
    """Seed of patch selection, of sampled codes and of the diffusion's starting noise."""
    selection: Literal["gumbel", "argmax"] = "gumbel"
    """How patches are chosen, as in pretokenize: at random by the selector's probabilities, or the most probable."""
    num_beams: int = 2
    """Beams of a caption's search (2 in the released code); 1 is greedy."""
    max_caption_tokens: int = 64
    """Longest caption, tokens."""
    num_tokenizations: int = 1
    """How often an image is tokenized for its caption: patches are selected at random, as in the released code. Of the captions, the
    one that is most probable on the average over the tokenizations is kept."""
    guidance_scale: float = 2.0
    """Weight of the prompt against the bare [IMG] in the logits of codes, Eq. 7 (2.0 in the paper); 1 turns guidance off."""
    temperature: float = 1.0
    """Divides the logits of codes before sampling (1.0 in the paper)."""
    top_k: int = 200
    """Codes are sampled from this many of the most probable (200 in the paper); 0 takes all."""
    top_p: float = 1.0
    """Codes are sampled from the most probable ones that hold this share of the probability."""
    num_candidates: int = 4
    """Sequences of codes drawn per prompt (4 in the paper, which lets CLIP choose). The one under which the language model finds the
    prompt most probable is painted."""
    num_inference_steps: int = 25
    """DDIM steps (25 in the released code)."""
    decoder_guidance_scale: float = 1.5
    """Weight of the features against none in the painted noise (1.5 in the released evaluation); 1 turns guidance off."""
    num_paintings: int = 1
    """Pictures painted per sequence of codes; the one whose contrastive embedding is nearest to the features' own is kept."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Type of the U-Net's matrix products (autocast)."""
    batch_size: int = 32
    """Items per forward pass."""
    num_threads: int | None = None
    """CPU threads; None leaves torch's choice."""

    def validate(self) -> None:
        for name in ("num_beams", "max_caption_tokens", "num_inference_steps", "batch_size", *REPETITIONS):
            check(getattr(self, name) >= 1, f"{name} {getattr(self, name)} must be at least 1.")
        for name in ("guidance_scale", "decoder_guidance_scale"):
            check(getattr(self, name) >= 1, f"{name} {getattr(self, name)} must be at least 1, which turns guidance off.")
        check(
            self.selection == "gumbel" or self.num_tokenizations == 1,
            f"num_tokenizations {self.num_tokenizations} would all be the same with selection {self.selection}; set it to 1.",
        )
        check(self.temperature > 0, f"temperature {self.temperature} must be above 0.")
        check(self.top_k >= 0, f"top_k {self.top_k} must not be negative; 0 takes all codes.")
        check(0 < self.top_p <= 1, f"top_p {self.top_p} must be above 0 and at most 1.")


def one_attempt(sampling: SamplingConfig) -> SamplingConfig:
    """The same sampling where everything is tried once, and nothing is chosen."""
    return dataclasses.replace(sampling, num_tokenizations=1, num_candidates=1, num_paintings=1)


@config
class GenerateConfig(SamplingConfig):
    """Captions, draws or reconstructs what the command line names."""

    decoder: str | None = None
    """Folder of a trained pixel decoder (train_decoder's RUN_DIR/model); drawing and reconstructing need it."""
    tokenizer: str | None = None
    """Folder that holds visual_tokenizer/; None takes the one beside the decoder."""
    language_model: str | None = None
    """Folder of a trained language model (pretrain's RUN_DIR/model); captioning and drawing need it."""
    out: str = "generated"
    """Folder that pictures, captions.jsonl, captions.txt and contact_sheet.png are written to."""

    def validate(self) -> None:
        super().validate()
        check(
            self.tokenizer is not None or self.decoder is not None,
            "Neither tokenizer nor decoder is set; give tokenizer=FOLDER for captions, decoder=FOLDER for pictures.",
        )
