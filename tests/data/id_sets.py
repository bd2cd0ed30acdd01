"""Random id sets as pretokenize leaves them, with captions of one image, refusals, left-out samples and damaged tars."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from lavit_dist.data.id_shard import IMAGE, TEXT, Encoding, IdDocument, InputFile, Outcomes
from lavit_dist.data.id_shard_writer import write_id_shard
from lavit_dist.data.manifest import Manifest, write_manifest
from lavit_dist.data.quarantine import Quarantined, count_reasons, write_quarantine

ENCODING = Encoding("visual", "text", "preprocessing", "settings", 50, 70)
REASONS = ("unreadable_image", "image_bomb")


@dataclasses.dataclass(frozen=True)
class Tar:
    """What became of the samples of a tar."""

    captions: Sequence[int]
    """Captions of each image that was used."""
    refused: Sequence[str] = ()
    """The reason of each sample that was not."""
    filtered: int = 0
    damaged: bool = False


tars = st.builds(
    Tar,
    captions=st.lists(st.integers(1, 3), max_size=6),
    refused=st.lists(st.sampled_from(REASONS), max_size=2),
    filtered=st.integers(0, 2),
    damaged=st.booleans(),
)
sets = st.lists(st.lists(tars, min_size=1, max_size=2), min_size=1, max_size=4).filter(
    lambda shards: any(tar.captions for shard in shards for tar in shard)
)
"""The tars of each shard; there is an image somewhere."""


def write_set(
    folder: Path, shards: Sequence[Sequence[Tar]], *, name: str = "", content: str = "", encoding: Encoding = ENCODING
) -> Manifest:
    """Writes a set whose tars are called NAME00000.tar and so on; those of another name or `content` have another digest."""
    random = np.random.default_rng(len(name))
    records, tar_number = [], 0
    for number, of_shard in enumerate(shards):
        documents: list[IdDocument] = []
        quarantined: list[Quarantined] = []
        inputs = []
        for tar in of_shard:
            file = InputFile(f"{name}{tar_number:05d}.tar", 1000 + tar_number, f"digest of {content}{name}{tar_number}")
            documents += _documents(file.name, tar, random)
            quarantined += [
                Quarantined(f"{file.name[:-4]}-bad-{place}", "decode", reason, "…") for place, reason in enumerate(tar.refused)
            ]
            if tar.damaged:
                quarantined.append(Quarantined(file.name, "index_shard", "truncated_tar", "…"))
            inputs.append(file)
            tar_number += 1
        refused = [record for record in quarantined if not record.key.endswith(".tar")]
        filtered = sum(tar.filtered for tar in of_shard)
        outcomes = Outcomes(
            samples=sum(len(tar.captions) for tar in of_shard) + len(refused) + filtered,
            quarantined=count_reasons(refused),
            filtered={"similarity": filtered} if filtered else {},
            damaged_inputs=count_reasons(record for record in quarantined if record.key.endswith(".tar")),
        )
        path = folder / f"shard-{number:05d}.arrow"
        write_quarantine(path.with_suffix(".quarantine.jsonl"), quarantined)
        records.append(write_id_shard(path, documents, encoding=encoding, inputs=inputs, outcomes=outcomes))
    return write_manifest(folder, records)


def write_texts(folder: Path, number: int) -> Manifest:
    """Writes a set of one shard, of texts without images."""
    documents = [IdDocument(f"{place}", 0, ((TEXT, [place]),), b"", "", ("texts.jsonl", place, 9)) for place in range(number)]
    path = folder / "shard-00000.arrow"
    write_quarantine(path.with_suffix(".quarantine.jsonl"), [])
    return write_manifest(folder, [write_id_shard(path, documents, encoding=ENCODING, inputs=())])


def close_hash(random: Any) -> int:
    """A hash that differs in at most three bits from one of five: many are copies of others."""
    centre = int(np.random.default_rng(int(random.integers(5))).integers(1 << 63))
    for bit in random.integers(64, size=random.integers(4)).tolist():
        centre ^= 1 << bit
    return centre


def _documents(tar_name: str, tar: Tar, random: Any) -> list[IdDocument]:
    documents = []
    for place, captions in enumerate(tar.captions):
        codes = random.integers(70, size=random.integers(1, 12)).tolist()
        image_hash = close_hash(random)
        for caption in range(captions):
            text = random.integers(50, size=random.integers(0, 9)).tolist()
            documents.append(
                IdDocument(
                    key=f"{tar_name[:-4]}-{place}",
                    caption_index=caption,
                    segments=((IMAGE, codes), (TEXT, text)),
                    keep_mask=bytes(random.integers(256, size=2).tolist()),
                    caption="Käfig " * len(text),
                    source=(tar_name, 512 * (place + 1), 99),
                    scores={"similarity": 0.5} if place % 2 else {},
                    image_hash=image_hash,
                )
            )
    return documents
