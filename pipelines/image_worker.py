"""What a Ray actor runs that makes shards of images: frozen models, beside helpers that decode pictures and write shards.

    helpers: open, decode ──batches of pixels──▶ actor: encode ──codes──▶ helper: write

At most `BATCHES_AHEAD` batches per decoder are under way, and one tar is opened ahead, however large the input. An actor does two shards
at a time, so that its device has work while one of them begins or ends.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from lavit_dist.checkpoint.official import load_visual_tokenizer
from lavit_dist.config.image_job import ImageJobConfig
from lavit_dist.data.id_shard import Encoding, Outcomes, ShardRecord
from lavit_dist.data.own_folder import OwnFolder
from lavit_dist.data.pair_decoder import STAGE, DecodedPairs, PairDecoder
from lavit_dist.data.pair_documents import EncodedImage, EncodedPairs, ShardWriter
from lavit_dist.data.pair_encoder import ImageEncoder
from lavit_dist.data.pair_reader import OpenedTar, PairReader
from lavit_dist.data.quarantine import Quarantined, SampleError, count_reasons
from lavit_dist.data.shard_list import Shard
from lavit_dist.data.tar_reader import RawSample
from lavit_dist.models.inference import freeze_for_inference
from lavit_dist.models.visual_tokenizer import VisualTokenizer
from lavit_dist.parallel.ray_helpers import Helpers
from pipelines.shard_jobs import ShardJob

JOBS_AT_A_TIME = 2
BATCHES_AHEAD = 2
KERNELS_KEPT = "64"
"""Of those that oneDNN makes for each number of tokens in a batch on a CPU; its own 1,024 grow to most of a GB."""


@dataclasses.dataclass
class Progress:
    """What an actor has done since it started."""

    images: int = 0
    """Images encoded, those of shards that failed later included."""
    device_seconds: float = 0.0
    """Time that the device was computing, or the CPU in its place."""
    quarantined: Counter[str] = dataclasses.field(default_factory=Counter)
    """Samples refused, per reason."""


class ImageWorker:
    """Makes id shards. Subclasses say of what: `decoder` and `models`."""

    def __init__(self, config: Any, encoding: Encoding, decoders: int, cpus_per_decoder: float) -> None:
        """`config` is an `ImageJobConfig`. `decoders` processes decode pictures for it, each counted as `cpus_per_decoder` CPUs."""
        self.config, self.encoding, self.decoders, self.cpus_per_decoder = config, encoding, decoders, cpus_per_decoder

    def decoder(self) -> PairDecoder:
        """What the helpers do with samples; it knows the size that pictures are squashed to. It is sent to them."""
        raise NotImplementedError

    def models(self) -> ImageEncoder:
        """What turns pictures of that size into codes, on this actor's device."""
        raise NotImplementedError

    def start(self) -> None:
        """Starts the helpers and loads the models."""
        config: ImageJobConfig = self.config
        torch.set_num_threads(config.ray.cpus_per_actor)
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KERNELS_KEPT)
        self._folder = OwnFolder(config.cache_folder, "cache_folder")
        decoder = self.decoder()
        self._image_size = decoder.image_size
        reader = (decoder, str(self._folder.path), config.fetch_attempts)
        self.readers = Helpers(PairReader, reader, self.decoders, self.cpus_per_decoder)
        self.writer = Helpers(ShardWriter, (self.encoding,), 1, 0)
        self.encoder = self.models()
        self._device_thread = ThreadPoolExecutor(
            1
        )  # one for all shards: each thread that computes has a pool of threads, which spin
        self._progress = Progress()
        self._numbers = itertools.count()

    def tokenizer(self) -> VisualTokenizer:
        """The visual tokenizer, frozen, on this actor's device."""
        config: ImageJobConfig = self.config
        return freeze_for_inference(
            load_visual_tokenizer(config.tokenizer).to(self.device),
            dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
            compile_blocks=config.compile,
        )

    @property
    def device(self) -> str:
        """Where models compute."""
        return "cuda" if self.config.ray.gpus_per_actor else "cpu"

    @property
    def selection_seed(self) -> int | None:
        """`ImageEncoder`'s seed."""
        seed: int = self.config.seed
        return seed if self.config.selection == "gumbel" else None

    def progress(self) -> Progress:
        """What it has done so far."""
        return dataclasses.replace(self._progress, quarantined=Counter(self._progress.quarantined))

    def stop(self) -> None:
        """Removes its folder."""
        self._folder.close()

    def run(self, job: ShardJob) -> ShardRecord:
        """Makes one shard: its quarantine file, the shard, and last its sidecar."""
        shard = GatheredShard(self.writer, f"{job.name} {next(self._numbers)}")
        try:
            for tar, decoded in self._decoded(job, shard):
                shard.add(tar, decoded, self._encode(decoded))
            self._progress.quarantined.update(shard.refused_reasons())
            return shard.commit(job)
        finally:
            shard.close()

    def _encode(self, decoded: DecodedPairs) -> list[EncodedImage]:
        return self._device_thread.submit(self._compute, decoded).result() if decoded.pairs else []

    def _compute(self, decoded: DecodedPairs) -> list[EncodedImage]:
        start = time.perf_counter()
        encoded = self.encoder.encode([pair.key for pair in decoded.pairs], decoded.pixels)
        self._progress.device_seconds += time.perf_counter() - start
        self._progress.images += len(decoded.pairs)
        return encoded

    def _decoded(self, job: ShardJob, shard: GatheredShard) -> Iterator[tuple[OpenedTar, DecodedPairs]]:
        """The batches of all tars of the job in order; the next ones are decoded meanwhile."""
        window: deque[tuple[OpenedTar, Sequence[RawSample], Future[DecodedPairs]]] = deque()
        for tar, samples in self._batches(job, shard):
            window.append((tar, samples, self.readers.call("decode", tar.place, samples)))
            if len(window) >= BATCHES_AHEAD * self.decoders:
                yield self._result(*window.popleft())
        while window:
            yield self._result(*window.popleft())

    def _batches(self, job: ShardJob, shard: GatheredShard) -> Iterator[tuple[OpenedTar, Sequence[RawSample]]]:
        """Which samples of which tar are decoded together; the next tar is opened meanwhile."""
        inputs = list(job.inputs)
        opening = deque([self._open(inputs.pop(0))])
        while opening:
            if inputs:
                opening.append(self._open(inputs.pop(0)))
            tar: OpenedTar = opening.popleft().result()
            shard.open(tar)
            for start in range(0, len(tar.samples), self.config.batch_size):
                yield tar, tar.samples[start : start + self.config.batch_size]

    def _open(self, shard: Shard) -> Future[OpenedTar]:
        return self.readers.call("open", shard, next(self._numbers))

    def _result(
        self, tar: OpenedTar, samples: Sequence[RawSample], decoding: Future[DecodedPairs]
    ) -> tuple[OpenedTar, DecodedPairs]:
        """What was decoded; of samples that decoders die of, those that do no harm alone."""
        from ray.exceptions import RayActorError

        try:
            return tar, decoding.result()
        except RayActorError:
            if len(samples) == 1:
                error = SampleError("kills_decoder", "processes that decode it die")
                return tar, DecodedPairs.of([], self._image_size, quarantined=[Quarantined.of(samples[0].key, STAGE, error)])
        alone = [self._result(tar, [sample], self.readers.call("decode", tar.place, [sample]))[1] for sample in samples]
        return tar, DecodedPairs.joined(alone)


class GatheredShard:
    """What the inputs of one shard have come to so far."""

    def __init__(self, writer: Helpers, name: str) -> None:
        """`name` tells it apart from all others that `writer` gathers."""
        self._writer, self._name = writer, name
        self._tars: list[OpenedTar] = []
        self._parts: list[EncodedPairs] = []
        self._adding: list[Future[None]] = []
        self._quarantined: list[Quarantined] = []
        self._filtered: Counter[str] = Counter()

    def open(self, tar: OpenedTar) -> None:
        """Takes note of the next tar."""
        self._tars.append(tar)
        self._quarantined += [dataclasses.replace(record, shard=tar.input.name) for record in tar.refused]

    def add(self, tar: OpenedTar, decoded: DecodedPairs, images: list[EncodedImage]) -> None:
        """Takes the next batch; the tars before its own have been read."""
        self._quarantined += [dataclasses.replace(record, shard=tar.input.name) for record in decoded.quarantined]
        self._filtered.update(decoded.filtered)
        self._parts.append(EncodedPairs(tar.input.name, decoded.pairs, images))
        self._send(len(self._parts) - 1)
        for earlier in self._tars[: self._tars.index(tar)]:
            _remove(earlier)

    def refused_reasons(self) -> list[str]:
        """The reason of each sample that was refused."""
        return [record.reason for record in self._quarantined]

    def commit(self, job: ShardJob) -> ShardRecord:
        """Has the shard written."""
        damage = [tar.damage for tar in self._tars if tar.damage is not None]
        outcomes = Outcomes(
            samples=sum(len(tar.samples) + len(tar.refused) for tar in self._tars),
            quarantined=count_reasons(self._quarantined),
            filtered=dict(sorted(self._filtered.items())),
            damaged_inputs=count_reasons(damage),
        )
        used = sum(len(part.pairs) for part in self._parts)
        assert outcomes.used == used, f"{outcomes} of {job.name} don't add up to {used} pairs"
        inputs = [tar.input for tar in self._tars]
        while True:
            for adding in self._adding:
                adding.result()
            self._adding.clear()
            whole = (self._name, len(self._parts), job.folder, job.file, inputs, outcomes, [*damage, *self._quarantined])
            committed: ShardRecord | list[int] = self._writer.call("commit", *whole).result()
            if isinstance(committed, ShardRecord):
                return committed
            for number in committed:  # the writer was started anew
                self._send(number)

    def close(self) -> None:
        """Lets the writer forget it, and removes fetched tars."""
        self._writer.call("forget", self._name)
        for tar in self._tars:
            _remove(tar)

    def _send(self, number: int) -> None:
        self._adding.append(self._writer.call("add", self._name, number, self._parts[number]))


def _remove(tar: OpenedTar) -> None:
    if tar.fetched:
        Path(tar.path).unlink(missing_ok=True)
