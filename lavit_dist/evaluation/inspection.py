"""What a visual tokenizer makes of pictures: patches, ids, what comes back, and where else an id occurs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from lavit_dist.data.image import to_image
from lavit_dist.evaluation.code_usage import CodeUsage
from lavit_dist.evaluation.patch_bank import PatchBank
from lavit_dist.models.selector import KEEP, keyed_gumbel_noise
from lavit_dist.models.tokenizer_losses import reconstruction_error
from lavit_dist.models.visual_tokenizer import VisualTokenizer

BANK_PATCHES = 8192
"""Patches that rebuilt pictures are put together from, over all pictures."""


@dataclass(frozen=True)
class InspectedImage:
    """One picture and what the tokenizer made of it."""

    name: str
    picture: Image.Image
    keep_mask: Tensor
    """[patch] bools."""
    codes: Tensor
    """[token]."""
    keep_probability: Tensor
    """What the selector gives each patch, [patch]."""
    errors: Tensor
    """1 - cosine of each reconstructed feature to the tower's, [patch]."""
    rebuilt: Image.Image | None
    """The nearest patches of other pictures to the reconstructed features; None where there is no other picture."""
    attainable: Image.Image | None
    """The nearest patches to the tower's own features."""
    painted: Image.Image | None = None
    """What the pixel decoder paints."""


@dataclass(frozen=True)
class Inspection:
    """Everything that a page shows of a tokenizer."""

    images: Sequence[InspectedImage]
    pictures: Sequence[Image.Image]
    """All pictures; the first of them are those of `images`."""
    usage: CodeUsage
    keep_ratio: float
    loss: float
    """Mean of 1 - cosine over all patches of all pictures (Eq. 4)."""


class Inspector:
    """Takes pictures batch by batch: first those to show, which are kept in full, then others, in which the codes are looked for."""

    def __init__(self, tokenizer: VisualTokenizer, *, seed: int | None, num_expected: int) -> None:
        """`seed` is that of the selection noise, None selects by arg-max; `num_expected` is about how many pictures will come."""
        self.tokenizer, self.seed = tokenizer, seed
        config = tokenizer.config
        self.device = next(tokenizer.parameters()).device
        self.num_patches = config.encoder.num_patches
        self.patches_per_picture = max(1, BANK_PATCHES // max(1, num_expected))
        self.usage = CodeUsage(config.codebook.size, config.encoder.width)
        self.pictures: list[Image.Image] = []
        self._shown: list[InspectedImage] = []
        self._features: list[tuple[Tensor, Tensor]] = []
        self._banks: list[PatchBank] = []
        self._loss = 0.0
        self._generator = torch.Generator().manual_seed(0)

    @torch.inference_mode()
    def add(self, names: Sequence[str], keys: Sequence[str], pixel_values: Tensor, *, show: bool) -> None:
        """Tokenizes a batch [picture, 3, H, W]; an image gets the ids of pretokenize with the same key and seed."""
        features = self.tokenizer.encode(pixel_values.to(self.device))
        noise = None if self.seed is None else keyed_gumbel_noise(keys, self.num_patches, self.seed).to(self.device)
        codes, keep_mask = self.tokenizer.tokenize_features(features, noise)
        rebuilt = self.tokenizer.reconstruct(codes)
        errors = reconstruction_error(features, rebuilt)
        first = len(self.pictures)
        self.usage.add(codes, keep_mask, features)
        self.pictures += [to_image(picture) for picture in pixel_values]
        self._loss += float(errors.mean(-1).sum())
        numbers = torch.arange(first, len(self.pictures))
        for place in range(len(names)):
            each = slice(place, place + 1)
            self._banks.append(
                PatchBank.draw(pixel_values[each], features[each], numbers[each], self.patches_per_picture, self._generator)
            )
        if not show:
            return
        probability = self.tokenizer.selector(features)[..., KEEP].exp()
        for place in range(len(names)):
            self._features.append((rebuilt[place].cpu(), features[place].cpu()))
            self._shown.append(
                InspectedImage(
                    name=names[place],
                    picture=self.pictures[first + place],
                    keep_mask=keep_mask[place].cpu(),
                    codes=codes[place].cpu(),
                    keep_probability=probability[place].cpu(),
                    errors=errors[place].cpu(),
                    rebuilt=None,
                    attainable=None,
                )
            )

    @torch.inference_mode()
    def finish(self) -> Inspection:
        """Rebuilds the shown pictures, now that all are there to take patches from."""
        images = self._shown
        if len(self.pictures) > 1:
            bank, numbers = PatchBank.join(self._banks), torch.arange(len(images))
            pairs = [torch.stack(each) for each in zip(*self._features, strict=True)]
            rebuilt, attainable = (bank.mosaic(features, numbers) for features in pairs)
            images = [
                replace(image, rebuilt=to_image(rebuilt[place]), attainable=to_image(attainable[place]))
                for place, image in enumerate(images)
            ]
        total = len(self.pictures)
        keep_ratio = sum(self.usage.tokens) / (total * self.num_patches)
        return Inspection(images, self.pictures, self.usage, keep_ratio, self._loss / total)
