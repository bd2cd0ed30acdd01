"""What the inputs of one shard come to, gathered by the actor that encodes them and kept by the process that will write them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from concurrent.futures import Future

from lavit_dist.data.id_shard import InputFile, Outcomes, ShardRecord
from lavit_dist.data.pair_decoder import DecodedPairs
from lavit_dist.data.pair_documents import EncodedImage, EncodedPairs
from lavit_dist.data.pair_reader import OpenedTar
from lavit_dist.data.quarantine import Quarantined, count_reasons
from lavit_dist.parallel.ray_helpers import Helpers
from pipelines.shard_jobs import ShardJob

COMMITS = 3
"""How often the process that writes may be found to have been started anew."""


class GatheredShard:
    """What the inputs of one shard have come to so far."""

    def __init__(self, writer: Helpers, name: str) -> None:
        """`name` tells it apart from all others that `writer` gathers."""
        self._writer, self._name = writer, name
        self._inputs: list[InputFile] = []
        self._samples = 0
        self._damage: list[Quarantined] = []
        self._parts: list[EncodedPairs] = []
        self._adding: list[Future[None]] = []
        self._quarantined: list[Quarantined] = []
        self._filtered: Counter[str] = Counter()

    def open(self, tar: OpenedTar) -> None:
        """Takes note of the next tar."""
        self._inputs.append(tar.input)
        self._samples += len(tar.samples) + len(tar.refused)
        self._quarantined += [dataclasses.replace(record, shard=tar.input.name) for record in tar.refused]
        if tar.damage is not None:
            self._damage.append(tar.damage)

    def add(self, tar: OpenedTar, decoded: DecodedPairs, images: list[EncodedImage]) -> None:
        """Takes the next batch."""
        self._quarantined += [dataclasses.replace(record, shard=tar.input.name) for record in decoded.quarantined]
        self._filtered.update(decoded.filtered)
        self._parts.append(EncodedPairs(tar.input.name, decoded.pairs, images))
        self._send(len(self._parts) - 1)

    def refused_reasons(self) -> list[str]:
        """The reason of each sample that was refused."""
        return [record.reason for record in self._quarantined]

    def commit(self, job: ShardJob) -> ShardRecord:
        """Has the shard written. Raises `RuntimeError` when processes that write it die."""
        outcomes = Outcomes(
            samples=self._samples,
            quarantined=count_reasons(self._quarantined),
            filtered=dict(sorted(self._filtered.items())),
            damaged_inputs=count_reasons(self._damage),
        )
        used = sum(len(part.pairs) for part in self._parts)
        assert outcomes.used == used, f"{outcomes} of {job.name} don't add up to {used} pairs"
        whole = (self._name, len(self._parts), job.folder, job.file, self._inputs, outcomes, [*self._damage, *self._quarantined])
        for _ in range(COMMITS):
            for adding in self._adding:
                adding.result()
            self._adding.clear()
            committed: ShardRecord | list[int] = self._writer.call("commit", *whole).result()
            if isinstance(committed, ShardRecord):
                return committed
            for number in committed:  # the writer was started anew
                self._send(number)
        raise RuntimeError(
            f"the processes that write shards died {COMMITS} times over this one; if memory runs out, lower inputs_per_shard"
        )

    def forget(self) -> None:
        """Lets the writer forget it."""
        self._writer.call("forget", self._name)

    def _send(self, number: int) -> None:
        self._adding.append(self._writer.call("add", self._name, number, self._parts[number]))
