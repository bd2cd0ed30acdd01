"""What a Ray actor runs that makes shards of images: frozen models, beside helpers that decode pictures and write shards.

    helpers: open, decode ──batches of pixels──▶ actor: encode ──codes──▶ helper: write

At most `BATCHES_AHEAD` batches per decoder and shard are under way, and one tar is opened ahead, however large the input. An actor does two
shards at a time, so that its device has work while one of them begins or ends.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from lavit_dist.checkpoint.official import load_visual_tokenizer
from lavit_dist.config.image_job import ImageJobConfig
from lavit_dist.data.id_shard import Encoding, ShardRecord
from lavit_dist.data.own_folder import OwnFolder
from lavit_dist.data.pair_decoder import STAGE, DecodedPairs, PairDecoder
from lavit_dist.data.pair_documents import EncodedImage, ShardWriter
from lavit_dist.data.pair_encoder import ImageEncoder
from lavit_dist.data.pair_reader import OpenedTar, PairReader
from lavit_dist.data.quarantine import Quarantined, SampleError
from lavit_dist.data.shard_list import Shard
from lavit_dist.data.tar_reader import RawSample
from lavit_dist.models.inference import freeze_for_inference
from lavit_dist.models.visual_tokenizer import VisualTokenizer
from lavit_dist.parallel.ray_helpers import Helpers
from pipelines.gathered_shard import GatheredShard
from pipelines.shard_jobs import ShardJob

JOBS_AT_A_TIME = 2
BATCHES_AHEAD = 2
KERNEL_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
KERNELS_KEPT = "16"
"""Of those that torch and oneDNN make on a CPU for each number of tokens in a batch; their own 1,024 grow to most of a GB."""


@dataclasses.dataclass
class Progress:
    """What an actor has done since it started."""

    images: int = 0
    """Images encoded, those of shards that failed later included."""
    device_seconds: float = 0.0
    """Time that the device was computing, or the CPU in its place."""
    quarantined: Counter[str] = dataclasses.field(default_factory=Counter)
    """Samples refused, per reason."""


class ImageWorker(ABC):
    """Makes id shards. Subclasses say of what: `decoder` and `models`."""

    def __init__(self, config: Any, encoding: Encoding, decoders: int, cpus_per_decoder: float) -> None:
        """`config` is an `ImageJobConfig`. `decoders` processes decode pictures for it, each counted as `cpus_per_decoder` CPUs."""
        self.config, self.encoding, self.decoders, self.cpus_per_decoder = config, encoding, decoders, cpus_per_decoder

    @abstractmethod
    def decoder(self) -> PairDecoder:
        """What the helpers do with samples; it knows the size that pictures are squashed to. It is sent to them."""

    @abstractmethod
    def models(self) -> ImageEncoder:
        """What turns pictures of that size into codes, on this actor's device."""

    def bytes_ahead(self) -> int:
        """What pixels of batches on their way to the model take at most."""
        batch = self.config.batch_size * 3 * self.decoder().image_size ** 2
        return JOBS_AT_A_TIME * BATCHES_AHEAD * self.decoders * batch

    def start(self) -> None:
        """Starts the helpers and loads the models."""
        config: ImageJobConfig = self.config
        torch.set_num_threads(config.ray.cpus_per_actor)
        for cache in KERNEL_CACHES:  # read at the first product
            os.environ.setdefault(cache, KERNELS_KEPT)
        self._folder = OwnFolder(config.cache_folder, "cache_folder")
        decoder = self.decoder()
        self._image_size = decoder.image_size
        self._reader = (decoder, config.fetch_attempts)
        self.readers = Helpers(PairReader, self._reader, self.decoders, self.cpus_per_decoder)
        self._judging = threading.Lock()
        self._judge_helper: Helpers | None = None
        self.writer = Helpers(ShardWriter, (self.encoding,), 1, 0)
        self.encoder = self.models()
        # One for all shards: each thread that computes has a pool of threads, which spin.
        self._device_thread = ThreadPoolExecutor(1)
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
        number = next(self._numbers)
        shard = GatheredShard(self.writer, f"{job.name} {number}")
        tars = JobTars(self.readers, job.inputs, self._folder.path / str(number))
        try:
            for tar, decoded in self._decoded(tars, shard):
                shard.add(tar, decoded, self._encode(decoded))
            self._progress.quarantined.update(shard.refused_reasons())
            return shard.commit(job)
        finally:
            shard.forget()
            tars.close()

    def _encode(self, decoded: DecodedPairs) -> list[EncodedImage]:
        return self._device_thread.submit(self._compute, decoded).result() if decoded.pairs else []

    def _compute(self, decoded: DecodedPairs) -> list[EncodedImage]:
        start = time.perf_counter()
        encoded = self.encoder.encode([pair.key for pair in decoded.pairs], decoded.pixels)
        self._progress.device_seconds += time.perf_counter() - start
        self._progress.images += len(decoded.pairs)
        return encoded

    def _decoded(self, tars: JobTars, shard: GatheredShard) -> Iterator[tuple[OpenedTar, DecodedPairs]]:
        """The batches of all tars of the job in order; the next ones are decoded meanwhile."""
        window: deque[tuple[OpenedTar, Sequence[RawSample], Future[DecodedPairs]]] = deque()
        for tar in tars:
            shard.open(tar)
            for start in range(0, len(tar.samples), self.config.batch_size):
                samples = tar.samples[start : start + self.config.batch_size]
                window.append((tar, samples, self.readers.call("decode", tar.place, samples)))
                if len(window) >= BATCHES_AHEAD * self.decoders:
                    tars.remove_before(window[0][0])
                    yield self._result(*window.popleft())
        while window:
            yield self._result(*window.popleft())

    def _result(
        self, tar: OpenedTar, samples: Sequence[RawSample], decoding: Future[DecodedPairs]
    ) -> tuple[OpenedTar, DecodedPairs]:
        """What was decoded; where the decoder died, of each sample by itself, and of those that are its death a record."""
        from ray.exceptions import RayActorError

        try:
            return tar, decoding.result()
        except RayActorError:  # what waits for the same decoder dies with it
            return tar, DecodedPairs.joined([self._judge(tar, sample) for sample in samples])

    def _judge(self, tar: OpenedTar, sample: RawSample) -> DecodedPairs:
        """A sample decoded by a process that does nothing else meanwhile, so that its death is this sample's doing."""
        from ray.exceptions import RayActorError

        with self._judging:
            if self._judge_helper is None:
                self._judge_helper = Helpers(PairReader, self._reader, 1, 0)
            try:
                decoded: DecodedPairs = self._judge_helper.call("decode", tar.place, [sample]).result()
                return decoded
            except RayActorError:
                error = SampleError("kills_decoder", "processes that decode it die")
                return DecodedPairs.of([], self._image_size, quarantined=[Quarantined.of(sample.key, STAGE, error)])


class JobTars:
    """The tars of a job, one after the other; the next one is opened meanwhile. Those of stores are copied to a folder of the job."""

    def __init__(self, readers: Helpers, inputs: Sequence[Shard], folder: Path) -> None:
        """`folder` is made when the first is fetched."""
        self._readers, self._inputs, self._folder = readers, inputs, folder
        self._opening: deque[Future[OpenedTar]] = deque()
        self._read: deque[OpenedTar] = deque()

    def __iter__(self) -> Iterator[OpenedTar]:
        for place, shard in enumerate(self._inputs):
            if not place:
                self._open(shard)
            if place + 1 < len(self._inputs):
                self._open(self._inputs[place + 1])
            tar: OpenedTar = self._opening.popleft().result()
            self._read.append(dataclasses.replace(tar, samples=[], refused=[]))
            yield tar

    def remove_before(self, tar: OpenedTar) -> None:
        """Removes the copies of tars that come before `tar`, of which all has been decoded."""
        while self._read[0].path != tar.path:
            earlier = self._read.popleft()
            if earlier.fetched:
                Path(earlier.path).unlink(missing_ok=True)

    def close(self) -> None:
        """Removes all copies, also one that is still on its way."""
        shutil.rmtree(self._folder, ignore_errors=True)
        for opening in self._opening:
            opening.add_done_callback(lambda _: shutil.rmtree(self._folder, ignore_errors=True))

    def _open(self, shard: Shard) -> None:
        self._opening.append(self._readers.call("open", shard, str(self._folder)))
