"""Endless batches of images, decoded ahead of their use."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lavit_dist.config.images import ImagesConfig
from lavit_dist.data.augmentation import Views
from lavit_dist.data.image import normalise
from lavit_dist.data.image_order import ImageOrder, IndexedOrder, Sample, StreamedOrder, places
from lavit_dist.data.picture import decode_image
from lavit_dist.data.quarantine import Quarantined, QuarantineLog, SampleError
from lavit_dist.data.shard_list import list_tars
from lavit_dist.data.shard_store import ShardStore
from lavit_dist.errors import check

STAGE = "decode"
Pending = list[tuple[Sample, Future[Tensor | Quarantined]]]


@dataclass(frozen=True)
class ImageBatch:
    """One rank's share of a global batch."""

    positions: list[int]
    """Places in the global batch, 0 .. global_batch_size - 1."""
    keys: list[str]
    """`<tar>/<key in the tar>`, with `#<view>` behind it when pictures are altered: equal keys are equal pixels."""
    pixel_values: Tensor
    """float32 [batch, 3, H, W], normalised."""


def open_images(
    config: ImagesConfig, *, image_size: int, global_batch_size: int, seed: int, rank: int, world_size: int
) -> ImageBatches:
    """This rank's share of the images that `config` names; raises `UserError` when there are none or the sizes don't fit together."""
    shards = list_tars(config.shards, config.storage_options, "images.shards")
    log = QuarantineLog()
    order: ImageOrder
    if config.order == "indexed":
        order = IndexedOrder(shards, log, global_batch_size=global_batch_size, seed=seed, rank=rank, world_size=world_size)
    else:
        store = ShardStore(
            shards,
            cache_folder=config.cache_folder,
            cache_bytes=config.cache_bytes,
            attempts=config.fetch_attempts,
            open_at_a_time=2 * -(-config.streams // world_size),
        )
        order = StreamedOrder(
            store,
            log,
            streams=config.streams,
            global_batch_size=global_batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )
    decoder = ImageDecoder(
        Views(config.augmentation, image_size, seed),
        max_pixels=config.max_pixels,
        cache_bytes=config.pixel_cache_bytes if config.order == "indexed" else 0,
    )
    positions = places(global_batch_size, rank, world_size)
    return ImageBatches(order, decoder, log, positions, threads=config.decode_threads, prefetch=config.prefetch_batches)


class ImageDecoder:
    """From samples to views of them. Decoded pictures are remembered up to `cache_bytes`, so a small set is decoded once."""

    def __init__(self, views: Views, *, max_pixels: int, cache_bytes: int) -> None:
        self.views = views
        self.max_pixels = max_pixels
        self._room = cache_bytes
        self._kept: dict[str, Image.Image] = {}
        self._lock = threading.Lock()

    def __call__(self, sample: Sample) -> Tensor | Quarantined:
        """uint8 [3, H, W], or the record of why there is none."""
        image = self._kept.get(sample.key)
        if image is None:
            try:
                image = self.views.kept(decode_image(sample.read(), self.max_pixels))
            except SampleError as error:
                return Quarantined.of(sample.key, STAGE, error)
            self._keep(sample.key, image)
        return self.views.make(image, sample.key, sample.epoch)

    def _keep(self, key: str, image: Image.Image) -> None:
        size = 3 * image.width * image.height
        with self._lock:
            if size <= self._room and key not in self._kept:
                self._room -= size
                self._kept[key] = image


class ImageBatches:
    """This rank's share of global batches without end; a thread prepares them ahead. One consumer.

    `state_dict` tells where the data are after the batches that were returned, and knows nothing of those prepared ahead.
    """

    def __init__(
        self, order: ImageOrder, decoder: ImageDecoder, log: QuarantineLog, positions: list[int], *, threads: int, prefetch: int
    ) -> None:
        self.order = order
        self.decoder = decoder
        self.positions = positions
        self.prefetch = prefetch
        self.wait_seconds = 0.0
        """How long `next` has waited for data, all calls together."""
        self._log = log
        self._state = order.state_dict()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="images")
        self._ahead: deque[Future[tuple[ImageBatch, dict[str, Any]]]] = deque()
        self._pending: Pending | None = None

    @property
    def quarantined(self) -> dict[str, Quarantined]:
        """What this rank could not use, by key, up to a limit; `quarantined_counts` has no limit."""
        return dict(self._log.records)

    @property
    def quarantined_counts(self) -> Mapping[str, int]:
        """How much this rank could not use, by reason."""
        return dict(self._log.counts)

    def next(self) -> ImageBatch:
        """The next batch. Raises `UserError` when nothing usable is left."""
        while len(self._ahead) <= self.prefetch:
            self._ahead.append(self._thread.submit(self._prepare))
        start = time.monotonic()
        try:
            batch, self._state = self._ahead.popleft().result()
        finally:
            self.wait_seconds += time.monotonic() - start
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Small plain values, alike on all ranks except for `positions`, where each has those of its own streams."""
        return self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of a run with any number of ranks, merged by `merge_states`.

        Raises `UserError` when the tars, the seed or the order are not those of the state.
        """
        self._stop()
        self.order.load_state_dict(state)
        self._state = self.order.state_dict()

    def close(self) -> None:
        """Ends the threads; no more batches come after it."""
        self._stop()
        self._thread.shutdown()
        self._pool.shutdown()
        self.order.close()

    def _stop(self) -> None:
        """Waits for the batch that is being prepared and drops it with all the others that are ahead."""
        for future in self._ahead:
            future.cancel()
        wait(self._ahead)
        self._ahead.clear()
        self._pending = None

    def _prepare(self) -> tuple[ImageBatch, dict[str, Any]]:
        pending = self._pending or self._submit(self.order.batch())
        samples, views = self._resolve(pending)
        state = self.order.state_dict()
        self._pending = self._submit(self.order.batch())  # decoded while the batch before is put together and used
        keys = [self.decoder.views.name(sample.key, sample.epoch) for sample in samples]
        return ImageBatch(self.positions, keys, normalise(torch.stack(views))), state

    def _submit(self, samples: list[Sample]) -> Pending:
        return [(sample, self._pool.submit(self.decoder, sample)) for sample in samples]

    def _resolve(self, pending: Pending) -> tuple[list[Sample], list[Tensor]]:
        """The samples of a batch and their views, once something usable has taken the place of what isn't."""
        samples = [sample for sample, _ in pending]
        views: dict[int, Tensor] = {}
        waiting = dict(enumerate(pending))
        while waiting:
            failed = []
            for place, (sample, future) in waiting.items():
                outcome = future.result()
                if isinstance(outcome, Quarantined):
                    self._log.add([outcome])
                    failed.append(place)
                else:
                    self.order.accept(sample)
                    views[place] = outcome
            for place in failed:
                samples[place] = self.order.instead(samples[place])
            waiting = dict(zip(failed, self._submit([samples[place] for place in failed]), strict=True))
        return samples, [views[place] for place in range(len(samples))]


def merge_states(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One state of the states of all ranks, with the positions of all streams; each rank takes its own from it."""
    merged: dict[str, Any] = {}
    for state in states:
        positions = merged.get("positions", {}) | state.get("positions", {})
        merged = {**state, "positions": positions} if positions else dict(state)
    check(bool(merged), "There is no saved state of the images to go on from.")
    return merged
