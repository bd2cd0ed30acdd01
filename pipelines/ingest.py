"""Pictures and captions, as people keep them, become tars of checked pairs; what can't be used is written down and left out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from lavit_dist.config.ingest import IngestConfig
from lavit_dist.data.pair_check import check_pair
from lavit_dist.data.pair_keys import choose_heldout, make_keys
from lavit_dist.data.pair_sources import Columns, SourcePair, read_source
from lavit_dist.data.pair_writer import EncodedPair, PairWriter
from lavit_dist.data.pairs import SPLITS
from lavit_dist.data.quarantine import Quarantined, SampleError
from lavit_dist.errors import UserError
from lavit_dist.observe.logs import setup_logging
from pipelines.pair_folder import close_pair_folder, open_pair_folder

STAGE = "ingest"
WINDOW = 256
"""Pairs that are in memory at a time."""


def ingest(config: IngestConfig) -> None:
    """Writes RUN_DIR/{train,heldout}/*.tar from `config.source`; raises `UserError` when not one pair of it is usable."""
    setup_logging()
    columns = Columns(image=config.image_column, caption=config.caption_column, key=config.key_column)
    pairs, refused = read_source(Path(config.source), columns, Path(config.image_root) if config.image_root else None)
    digest = _digest(pairs)
    if not open_pair_folder(config, digest):
        return
    keys = make_keys((pair.key, pair.name) for pair in pairs)
    by_key = dict(zip(keys, pairs, strict=True))
    heldout = choose_heldout(keys, config.heldout_fraction, config.seed, lambda key: _is_usable(by_key[key], key, config))
    root = Path(config.run_dir)
    writers = {split: PairWriter(root / split, config.samples_per_shard) for split in SPLITS}
    for record in refused:
        writers["train"].add(record)
    for key, outcome in zip(keys, _encode_all(by_key, config), strict=True):
        if isinstance(outcome, Quarantined):
            refused.append(outcome)
        writers["heldout" if key in heldout else "train"].add(outcome)
    for writer in writers.values():
        writer.close()
    if not any(writer.samples for writer in writers.values()):
        example = f"; the first: {refused[0].key}: {refused[0].reason}: {refused[0].message}" if refused else ""
        raise UserError(
            f"None of the {len(refused)} pairs of source {config.source} can be used{example}; see {root}/*/*.quarantine.jsonl."
        )
    if config.heldout_fraction and not all(writer.samples for writer in writers.values()):
        raise UserError(
            f"source {config.source} holds one usable pair, of which heldout_fraction {config.heldout_fraction} can't leave one to train on"
            " and hold one out; add pairs, or set heldout_fraction to 0."
        )
    close_pair_folder(root, writers, digest)


def _encode_all(by_key: dict[str, SourcePair], config: IngestConfig) -> Iterator[EncodedPair | Quarantined]:
    """What becomes of each pair, in order; several are worked on at a time."""
    remaining = iter(by_key.items())
    with ThreadPoolExecutor(config.num_threads) as pool:
        while window := list(islice(remaining, WINDOW)):
            yield from pool.map(lambda item: _encode(item[1], item[0], config), window)


def _encode(pair: SourcePair, key: str, config: IngestConfig) -> EncodedPair | Quarantined:
    try:
        return check_pair(pair, key, config.max_pixels, config.max_side)
    except SampleError as error:
        return Quarantined.of(key, STAGE, error)


def _is_usable(pair: SourcePair, key: str, config: IngestConfig) -> bool:
    return isinstance(_encode(pair, key, config), EncodedPair)


def _digest(pairs: Sequence[SourcePair]) -> str:
    """Tells one listing of a source from another."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps([pair.key, pair.name, pair.captions]).encode())
    return digest.hexdigest()
