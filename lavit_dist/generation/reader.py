"""From pixels to visual codes, in batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lavit_dist.config.generate import SamplingConfig
from lavit_dist.config.images import MAX_PIXELS
from lavit_dist.data.image import preprocess
from lavit_dist.data.picture import decode_image
from lavit_dist.data.quarantine import SampleError
from lavit_dist.errors import UserError
from lavit_dist.models.selector import keyed_gumbel_noise
from lavit_dist.models.visual_tokenizer import TokenizedImages, VisualTokenizer


def tokenize_images(
    tokenizer: VisualTokenizer, keys: Sequence[str], pixel_values: Sequence[Tensor], *, seed: int | None, batch_size: int
) -> TokenizedImages:
    """Codes of images [3, H, W] and which patches they came from; the same seed and keys as in pretokenize give the same ids.

    A `seed` of None takes the most probable patches.
    """
    device = next(tokenizer.parameters()).device
    parts = []
    with torch.inference_mode():
        for start in range(0, len(keys), batch_size):
            batch = slice(start, start + batch_size)
            noise = None
            if seed is not None:
                noise = keyed_gumbel_noise(keys[batch], tokenizer.config.encoder.num_patches, seed).to(device)
            parts.append(tokenizer.tokenize(torch.stack(list(pixel_values[batch])).to(device), noise))
    return TokenizedImages([codes for part in parts for codes in part.codes], torch.cat([part.keep_mask for part in parts]))


def tokenize_repeatedly(
    tokenizer: VisualTokenizer, keys: Sequence[str], pixel_values: Sequence[Tensor], sampling: SamplingConfig, times: int
) -> list[TokenizedImages]:
    """`times` tokenizations with independent selections; the first is that of `sampling.seed`."""
    seeds: Iterable[int | None] = range(sampling.seed, sampling.seed + times) if sampling.selection == "gumbel" else [None] * times
    return [tokenize_images(tokenizer, keys, pixel_values, seed=seed, batch_size=sampling.batch_size) for seed in seeds]


def read_image(path: Path, size: int) -> Tensor:
    """The picture in a file as the tower's input [3, size, size]. Raises `UserError` naming a file that isn't a readable picture."""
    try:
        return preprocess(decode_image(path.read_bytes(), MAX_PIXELS), size)
    except OSError as error:
        raise UserError(f"The image {path} can't be opened ({error.strerror}); check its name.") from error
    except SampleError as error:
        raise UserError(f"The image {path} can't be used: {error.message}; give a JPEG, PNG or WebP picture.") from error
