"""Which image comes when: over an index of local tars, or by streams through any number of tars."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lavit_dist.data.order import IMAGES, permutation
from lavit_dist.data.quarantine import QuarantineLog
from lavit_dist.data.shard_list import Fingerprint, Shard
from lavit_dist.data.shard_store import ShardStore, index_images
from lavit_dist.data.shard_stream import ShardStream, ShardWalk, StreamedSample, StreamPosition
from lavit_dist.data.tar_reader import FileLocation, read_bytes
from lavit_dist.errors import UserError, check

FETCH_THREADS = 8


class Sample(Protocol):
    """An image that has been chosen and not been read yet."""

    @property
    def key(self) -> str:
        """Unique over the set: `<tar>/<key in the tar>`."""

    @property
    def epoch(self) -> int:
        """How often the set has been gone through before."""

    @property
    def read(self) -> Callable[[], bytes]:
        """Reads the file; raises `SampleError`."""


class ImageOrder(Protocol):
    """Endless samples for a rank's share of each global batch."""

    def batch(self) -> list[Any]:
        """The samples of this rank's places in the next global batch."""

    def instead(self, sample: Any) -> Any:
        """What takes the place of one that can't be used; raises `UserError` when there is nothing."""

    def accept(self, sample: Any) -> None:
        """Takes note that a sample could be used."""

    def state_dict(self) -> dict[str, Any]:
        """Where the order is, plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there; raises `UserError` when the set has changed."""

    def close(self) -> None:
        """Ends its threads."""


def places(global_batch_size: int, rank: int, world_size: int) -> list[int]:
    """The places of a global batch that are a rank's: every `world_size`-th."""
    check(
        global_batch_size % world_size == 0,
        f"global_batch_size {global_batch_size} is not a multiple of the {world_size} data-parallel ranks; choose one that is.",
    )
    return list(range(rank, global_batch_size, world_size))


@dataclass(frozen=True)
class IndexedSample:
    """The image at `place` of the order of its epoch, or, `skipped` places on, the one that stands in for it."""

    key: str
    epoch: int
    place: int
    skipped: int
    read: Callable[[], bytes]


class IndexedOrder:
    """One permutation of all images per epoch.

    Image number n of the run is at place n % images of epoch n // images. An image that can't be used gives way to the next one in the
    order, so that a batch depends on nothing that came before it.
    """

    def __init__(
        self, shards: Sequence[Shard], log: QuarantineLog, *, global_batch_size: int, seed: int, rank: int, world_size: int
    ) -> None:
        """Reads the headers of all tars."""
        remote = next((shard for shard in shards if shard.file_system is not None), None)
        check(
            remote is None,
            f"images.order indexed reads tars on a local disk, and {remote and remote.path} is not on one; set images.order to streamed.",
        )
        self.fingerprint = Fingerprint(shards)
        self.global_batch_size, self.seed = global_batch_size, seed
        self.places = places(global_batch_size, rank, world_size)
        self.paths = [shard.path for shard in shards]
        self.keys: list[str] = []
        locations: list[tuple[int, int, int]] = []
        for number, shard in enumerate(shards):
            index = index_images(shard.name, Path(shard.path))
            log.add(index.quarantined)
            for sample in index.samples:
                image = sample.image
                assert image is not None, "index_shard lets no sample without an image through"
                self.keys.append(f"{shard.name}/{sample.key}")
                locations.append((number, image.offset, image.size))
        if not self.keys:
            raise UserError(
                f"None of the {len(shards)} tars of images.shards holds a usable image ({dict(log.counts)}), {self.paths[0]} for one;"
                " name tars that hold images."
            )
        self._locations = np.array(locations, np.int64)
        self._order = lru_cache(maxsize=2)(lambda epoch: permutation(len(self.keys), seed, epoch, IMAGES))
        self._taken = 0

    def batch(self) -> list[IndexedSample]:
        first, self._taken = self._taken, self._taken + self.global_batch_size
        return [self._sample(*divmod(first + place, len(self.keys))) for place in self.places]

    def instead(self, sample: IndexedSample) -> IndexedSample:
        if sample.skipped + 1 == len(self.keys):
            raise UserError(
                f"None of the {len(self.keys)} images of images.shards can be decoded; look at the warnings above and name other tars."
            )
        return self._sample(sample.epoch, sample.place, sample.skipped + 1)

    def accept(self, sample: IndexedSample) -> None:
        """Nothing follows from it here."""

    def state_dict(self) -> dict[str, Any]:
        return {"order": "indexed", "seed": self.seed, "fingerprint": self.fingerprint.state(), "images": self._taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state(state, self.state_dict())
        self.fingerprint.check(state["fingerprint"])
        self._taken = int(state["images"])

    def close(self) -> None:
        """There are none."""

    def _sample(self, epoch: int, place: int, skipped: int = 0) -> IndexedSample:
        number = int(self._order(epoch)[(place + skipped) % len(self.keys)])
        shard, offset, size = self._locations[number].tolist()
        location = FileLocation(self.paths[shard], offset, size)
        return IndexedSample(self.keys[number], epoch, place, skipped, lambda: read_bytes(location))


class StreamedOrder:
    """`streams` endless readers over all ranks: place p of a global batch is the next image of stream p % streams.

    A stream is one rank's: that with number s % world_size. What a batch holds depends on the number of streams, not on that of ranks.
    """

    def __init__(
        self, store: ShardStore, log: QuarantineLog, *, streams: int, global_batch_size: int, seed: int, rank: int, world_size: int
    ) -> None:
        check(
            streams % world_size == 0,
            f"images.streams {streams} is not a multiple of the {world_size} data-parallel ranks; choose a multiple.",
        )
        check(
            global_batch_size % streams == 0,
            f"images.streams {streams} does not divide global_batch_size {global_batch_size}; choose a divisor of it.",
        )
        self.fingerprint = Fingerprint(store.shards)
        self.seed, self.streams = seed, streams
        self.places = places(global_batch_size, rank, world_size)
        walk = ShardWalk(len(store.shards), streams, seed)
        self.pool = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="fetch")
        self.own = {number: ShardStream(number, walk, store, self.pool, log.add) for number in range(rank, streams, world_size)}

    def batch(self) -> list[StreamedSample]:
        return [self.own[place % self.streams].next() for place in self.places]

    def instead(self, sample: StreamedSample) -> StreamedSample:
        self.own[sample.stream].reject(sample)
        return self.own[sample.stream].next()

    def accept(self, sample: StreamedSample) -> None:
        self.own[sample.stream].accept(sample)

    def state_dict(self) -> dict[str, Any]:
        positions = {
            str(number): [stream.position.epoch, stream.position.shard, stream.position.sample]
            for number, stream in self.own.items()
        }
        return self._head() | {"positions": positions}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state(state, self._head())
        self.fingerprint.check(state["fingerprint"])
        lacking = [number for number in self.own if str(number) not in state["positions"]]
        check(
            not lacking,
            f"The saved state of the images lacks stream {lacking and lacking[0]} of {self.streams}; merge the states of all ranks that saved it.",
        )
        for number, stream in self.own.items():
            stream.restore(StreamPosition(*state["positions"][str(number)]))

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)

    def _head(self) -> dict[str, Any]:
        return {"order": "streamed", "seed": self.seed, "streams": self.streams, "fingerprint": self.fingerprint.state()}


def check_state(state: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises `UserError` when a state was saved with settings that give another order."""
    for name in ("order", "streams", "seed"):
        check(
            state.get(name) == now.get(name),
            f"The images were read with {name} {state.get(name)} before and now with {name} {now.get(name)}; set it back, or start a new run.",
        )
