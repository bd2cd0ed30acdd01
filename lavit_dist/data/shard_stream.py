"""Endless readers of tars, a fixed number of them whatever the number of ranks, so that no rank runs out before another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from lavit_dist.data.order import IMAGES, SHARDS, permutation
from lavit_dist.data.quarantine import Quarantined, SampleError
from lavit_dist.data.shard_store import OpenShard, ShardStore
from lavit_dist.errors import UserError

STAGE = "read_images"
PATIENCE = 100
"""Tars in succession without one usable image after which a reader gives up."""
VISITS_PER_TAR = 20
"""Where there are few tars it gives up sooner. It draws them at random: after so many draws per tar it has surely met every one."""


@dataclass(frozen=True)
class Visit:
    """A tar that a stream reads from: of its shuffled samples it takes those at `part`, `part + parts`, `part + 2 parts`, ..."""

    epoch: int
    ordinal: int
    """Which of the stream's tars of this epoch it is."""
    shard: int
    part: int
    parts: int


@dataclass(frozen=True)
class StreamPosition:
    """Where a stream is: the next sample it gives, in its own counting."""

    epoch: int = 0
    shard: int = 0
    sample: int = 0


@dataclass(frozen=True)
class StreamedSample:
    """A picture's bytes before they are read. `visit` counts the tars that the stream has been through."""

    stream: int
    key: str
    epoch: int
    visit: int
    read: Callable[[], bytes]


class ShardWalk:
    """Which tar each stream reads when: a pure function of the number of tars, the number of streams and the seed.

    In each epoch the streams share a permutation of the tars: stream s takes those at s, s + streams, ... Where there are fewer tars
    than streams, streams share a tar and each takes a part of its samples, another one in every epoch.
    """

    def __init__(self, shards: int, streams: int, seed: int) -> None:
        self.shards = shards
        self.streams = streams
        self.seed = seed
        self._order = lru_cache(maxsize=4)(lambda epoch: permutation(shards, seed, epoch, SHARDS))

    def visits(self, stream: int, epoch: int = 0, ordinal: int = 0) -> Iterator[Visit]:
        """The endless visits of a stream from one on."""
        while True:
            if self.shards >= self.streams:
                mine = range(stream, self.shards, self.streams)
                parts, part = 1, 0
            else:
                mine = range(stream % self.shards, self.shards, self.shards)
                parts = len(range(stream % self.shards, self.streams, self.shards))
                part = (stream // self.shards + epoch) % parts
            for place in range(ordinal, len(mine)):
                yield Visit(epoch, place, int(self._order(epoch)[mine[place]]), part, parts)
            epoch, ordinal = epoch + 1, 0

    def samples(self, visit: Visit, size: int) -> NDArray[np.int64]:
        """The samples of a tar with `size` of them in the order of the visit."""
        return permutation(size, self.seed, visit.epoch, IMAGES, visit.shard)[visit.part :: visit.parts]


class ShardStream:
    """One endless reader. The tar after the one that it reads is opened, and fetched if need be, by `pool` meanwhile."""

    def __init__(
        self, number: int, walk: ShardWalk, store: ShardStore, pool: Executor, report: Callable[[Sequence[Quarantined]], None]
    ) -> None:
        """`report` is told of what can't be used."""
        self.number = number
        self.walk = walk
        self.store = store
        self.pool = pool
        self.report = report
        self.patience = min(PATIENCE, VISITS_PER_TAR * walk.shards)
        self.restore(StreamPosition())

    def restore(self, position: StreamPosition) -> None:
        """Goes on from `position`."""
        self.position = position
        self._visit = self._last_good_visit = self._barren = 0
        self._visits = self.walk.visits(self.number, position.epoch, position.shard)
        self._ahead = self._open_next()
        self._shard: OpenShard | None = None

    def next(self) -> StreamedSample:
        """The next sample; raises `UserError` when the stream has given up."""
        while self._shard is None or self.position.sample >= len(self._samples):
            self._enter(*self._ahead)
        shard, visit, place = self._shard, self._current, self.position.sample
        self.position = StreamPosition(visit.epoch, visit.ordinal, place + 1)
        sample = shard.samples[self._samples[place]]
        image = sample.image
        assert image is not None, "index_shard lets no sample without an image through"
        return StreamedSample(self.number, f"{shard.name}/{sample.key}", visit.epoch, self._visit, partial(shard.read, image))

    def accept(self, sample: StreamedSample) -> None:
        """Takes note that `sample` was usable."""
        self._last_good_visit = max(self._last_good_visit, sample.visit)

    def reject(self, sample: StreamedSample) -> None:
        """Takes note that `sample` was not; raises `UserError` when the stream gives up."""
        self._check_patience(sample.visit - self._last_good_visit)

    def _open_next(self) -> tuple[Visit, Future[OpenShard]]:
        visit = next(self._visits)
        return visit, self.pool.submit(self.store.open, visit.shard)

    def _enter(self, visit: Visit, opening: Future[OpenShard]) -> None:
        if (visit.epoch, visit.ordinal) != (self.position.epoch, self.position.shard):
            self.position = StreamPosition(visit.epoch, visit.ordinal, 0)
        name = self.store.shards[visit.shard].name
        self._shard, self._current, self._samples = None, visit, np.empty(0, np.int64)
        try:
            shard = opening.result()
            self.report(shard.quarantined)
            if not shard.samples:
                raise SampleError("no_images", "the tar holds no usable image")
            self._shard, self._samples = shard, self.walk.samples(visit, len(shard.samples))
            self._barren = 0
        except SampleError as error:
            self.report([Quarantined.of(name, STAGE, error)])
            self._barren += 1
            self._check_patience(self._barren)
        if self._shard is None or len(self._samples):
            self._visit += 1
        self._ahead = self._open_next()

    def _check_patience(self, tars: int) -> None:
        if tars > self.patience:
            raise UserError(
                f"{self.patience} tars in succession held no image that can be used; look at the warnings above and mend images.shards."
            )
