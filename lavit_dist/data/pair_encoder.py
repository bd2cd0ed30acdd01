"""From a tar of image-text pairs to documents of ids."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lavit_dist.data.id_shard import IMAGE, TEXT, IdDocument
from lavit_dist.data.image import decode_image, preprocess
from lavit_dist.data.pairs import PairSample, read_pairs
from lavit_dist.data.quarantine import Quarantined, SampleError
from lavit_dist.data.tar_reader import read_bytes
from lavit_dist.data.text_tokenizer import TextTokenizer
from lavit_dist.models.selector import keyed_gumbel_noise
from lavit_dist.models.visual_tokenizer import VisualTokenizer

STAGE = "pretokenize"


class PairEncoder:
    """Encodes pairs with a frozen visual tokenizer, on the device that it is on. What a pair becomes depends on the pair alone.

    Images are batched as they come: the merger packs what they keep, so unlike images cost no padding. `freeze_for_inference` says
    how far rounding lets an image have the same ids in any batch.
    """

    def __init__(
        self,
        visual: VisualTokenizer,
        text: TextTokenizer,
        *,
        seed: int | None,
        batch_size: int,
        max_pixels: int,
        decode_threads: int = 1,
    ) -> None:
        """`seed` is that of the selection noise; None selects by arg-max."""
        self.visual, self.text, self.seed = visual, text, seed
        self.batch_size, self.max_pixels, self.decode_threads = batch_size, max_pixels, decode_threads
        self.device = next(visual.parameters()).device

    def encode(self, shard: Path) -> tuple[list[IdDocument], list[Quarantined]]:
        """One document per caption, in the order of the tar, and a record of each sample that can't be used.

        An image with several captions is encoded once, and its documents share the codes.
        """
        samples, quarantined = read_pairs(shard)
        documents: list[IdDocument] = []
        for batch, decoded in self._decoded_batches(samples):
            readable = [(sample, pixels) for sample, pixels in zip(batch, decoded, strict=True) if isinstance(pixels, Tensor)]
            quarantined += [record for record in decoded if isinstance(record, Quarantined)]
            if readable:
                documents += self._encode_batch([sample for sample, _ in readable], torch.stack([pixels for _, pixels in readable]))
        return documents, quarantined

    @torch.inference_mode()
    def _encode_batch(self, samples: list[PairSample], pixel_values: Tensor) -> list[IdDocument]:
        noise = None
        if self.seed is not None:
            num_patches = self.visual.config.encoder.num_patches
            noise = keyed_gumbel_noise([sample.key for sample in samples], num_patches, self.seed).to(self.device)
        codes, keep_mask = self.visual.tokenize(pixel_values.to(self.device), noise)
        masks = np.packbits(keep_mask.cpu().numpy(), axis=1)
        return [
            document
            for sample, image_codes, mask in zip(samples, codes, masks, strict=True)
            for document in self._documents(sample, image_codes.tolist(), mask.tobytes())
        ]

    def _documents(self, sample: PairSample, codes: list[int], keep_mask: bytes) -> Iterator[IdDocument]:
        location = sample.image_location
        for index, caption in enumerate(sample.captions):
            yield IdDocument(
                key=sample.key,
                caption_index=index,
                segments=((IMAGE, codes), (TEXT, self.text.encode(caption))),
                keep_mask=keep_mask,
                caption=caption,
                source=(Path(location.shard).name, location.offset, location.size),
                scores=_scores(sample.metadata),
            )

    def _decoded_batches(self, samples: Sequence[PairSample]) -> Iterator[tuple[Sequence[PairSample], list[Tensor | Quarantined]]]:
        """Batches and their pixels; the next batch is decoded while the caller encodes this one."""
        batches = [samples[start : start + self.batch_size] for start in range(0, len(samples), self.batch_size)]
        with ThreadPoolExecutor(self.decode_threads) as pool:

            def submit(batch: Sequence[PairSample] | None) -> list[Future[Tensor | Quarantined]]:
                return [pool.submit(self._decode, sample) for sample in batch or ()]

            pending = submit(batches[0] if batches else None)
            for batch, following in itertools.zip_longest(batches, batches[1:]):
                current, pending = pending, submit(following)
                yield batch, [future.result() for future in current]

    def _decode(self, sample: PairSample) -> Tensor | Quarantined:
        try:
            image = decode_image(read_bytes(sample.image_location), self.max_pixels)
        except SampleError as error:
            return Quarantined.of(sample.key, STAGE, error)
        return preprocess(image, self.visual.config.encoder.image_size)


def _scores(metadata: dict[str, Any]) -> dict[str, float]:
    """The numbers at the top level of a pair's metadata."""
    return {name: value for name, value in metadata.items() if isinstance(value, int | float) and not isinstance(value, bool)}
