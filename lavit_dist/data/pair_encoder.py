"""From pixels to codes, with a frozen visual tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lavit_dist.data.image import normalise
from lavit_dist.data.pair_documents import EncodedImage
from lavit_dist.models.selector import keyed_gumbel_noise
from lavit_dist.models.visual_tokenizer import VisualTokenizer


class ImageEncoder:
    """Encodes pictures on the device that the tokenizer is on. What a picture becomes depends on itself and its key alone.

    Pictures are batched as they come: the merger packs what they keep, so unlike ones cost no padding. `freeze_for_inference` says how
    far rounding lets a picture have the same ids in any batch.
    """

    def __init__(self, visual: VisualTokenizer, *, seed: int | None) -> None:
        """`seed` is that of the selection noise; None selects by arg-max."""
        self.visual, self.seed = visual, seed
        self.device = next(visual.parameters()).device

    @torch.inference_mode()
    def encode(self, keys: Sequence[str], pixels: NDArray[np.uint8]) -> list[EncodedImage]:
        """What each picture of `pixels` [picture, 3, height, width] becomes."""
        return self.encode_values(keys, normalise(torch.tensor(pixels, device=self.device)))

    def encode_values(self, keys: Sequence[str], pixel_values: Tensor) -> list[EncodedImage]:
        """`encode` of preprocessed pixels [picture, 3, H, W] of the tower's size."""
        noise = None
        if self.seed is not None:
            num_patches = self.visual.config.encoder.num_patches
            noise = keyed_gumbel_noise(keys, num_patches, self.seed).to(self.device)
        codes, keep_mask = self.visual.tokenize(pixel_values, noise)
        lengths = keep_mask.sum(-1).tolist()
        flat = torch.cat(codes).to(torch.int32).cpu().numpy()  # one copy from the device for all
        of_images = np.split(flat, np.cumsum(lengths)[:-1])
        masks = np.packbits(keep_mask.cpu().numpy(), axis=1)
        return [EncodedImage(ids.tobytes(), mask.tobytes()) for ids, mask in zip(of_images, masks, strict=True)]
