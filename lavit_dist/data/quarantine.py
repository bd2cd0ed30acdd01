"""Samples that can't be used: each is written down with its reason, and the job goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lavit_dist.files import write_atomically

logger = logging.getLogger(__name__)
LOGGED_ONE_BY_ONE = 10


class SampleError(Exception):
    """One sample is unusable. `reason` is a short fixed word such as `unreadable_image`; `message` says what was found in `data`."""

    def __init__(self, reason: str, message: str, data: bytes | None = None) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message
        self.sha256 = None if data is None else hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Quarantined:
    """The record of an unusable sample."""

    key: str
    """The sample's key; the shard's file name where the trouble is with the shard as a whole."""
    stage: str
    """The step that refused it, such as `ingest` or `read_pairs`."""
    reason: str
    """The short fixed word for the kind of trouble."""
    message: str
    """What was found, in words."""
    sha256: str | None = None
    """Digest of the bytes that were refused; None where there were none."""
    shard: str | None = None
    """The tar that it lies in, where the file of records is about several."""

    @classmethod
    def of(cls, key: str, stage: str, error: SampleError) -> Quarantined:
        """The record of `error`, raised for the sample `key`."""
        return cls(key, stage, error.reason, error.message, error.sha256)


def write_quarantine(path: Path, records: Iterable[Quarantined]) -> None:
    """Writes `records` as JSON lines, whole or not at all; no records make an empty file, which says that all went well."""
    write_atomically(path, quarantine_lines(records))


def quarantine_lines(records: Iterable[Quarantined]) -> bytes:
    """The content of a quarantine file."""
    return "".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in records).encode()


def read_quarantine(path: Path) -> list[Quarantined]:
    """What `write_quarantine` wrote."""
    return parse_quarantine(path.read_bytes())


def parse_quarantine(content: bytes) -> list[Quarantined]:
    """The records in the content of a quarantine file. Raises `ValueError` or `TypeError` for what is none."""
    return [Quarantined(**json.loads(line)) for line in content.splitlines()]


def count_reasons(records: Iterable[Quarantined]) -> dict[str, int]:
    """How many records there are per reason, in alphabetical order."""
    return dict(sorted(Counter(record.reason for record in records).items()))


class QuarantineLog:
    """What a long run passes over: counted by reason, logged, and recorded up to a limit, so that dirty data can't fill the memory."""

    def __init__(self, max_records: int = 10_000) -> None:
        self.max_records = max_records
        self.records: dict[str, Quarantined] = {}
        """By key, the first `max_records` of them."""
        self.counts: Counter[str] = Counter()
        """How many were passed over per reason; beyond the limit, one that comes again in a later epoch is counted again."""

    def add(self, records: Iterable[Quarantined]) -> None:
        """Takes up records, each key once. The first ten are logged one by one, later ones as a sum whenever it has doubled."""
        for record in records:
            if record.key in self.records:
                continue
            if len(self.records) < self.max_records:
                self.records[record.key] = record
            self.counts[record.reason] += 1
            number = self.counts.total()
            if number <= LOGGED_ONE_BY_ONE:
                logger.warning("%s is passed over: %s: %s", record.key, record.reason, record.message)
            elif number % LOGGED_ONE_BY_ONE == 0 and (number // LOGGED_ONE_BY_ONE).bit_count() == 1:
                logger.warning("%d samples have been passed over: %s", number, dict(sorted(self.counts.items())))
