"""Time and memory of the packing plan of a large id set, and of a start with the plan at hand.

    python benchmarks/packing_plan.py [--documents 400000000] [--shard-documents 100000] [--seq-len 2048]

The set is real to the program: Arrow shards, sidecars' records and a manifest. To fit any disk, only `DISTINCT` shards are written, and
the others are links to them; so after the first pass they are read from memory. Lengths are those of benchmarks/packing.py.
Each start is a process of its own; its peak of resident memory that is its own, memory maps aside, is read from /proc.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from packing import lavit_lengths

from lavit_dist.data.id_shard import IMAGE, TEXT, Encoding, IdDocument, ShardRecord
from lavit_dist.data.id_shard_writer import write_id_shard
from lavit_dist.data.manifest import load_manifest, write_manifest
from lavit_dist.data.rows import RowDataset
from lavit_dist.models.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=32_000, codebook_size=16_384)
ENCODING = Encoding("benchmark", "benchmark", "benchmark", "benchmark", VOCABULARY.text_size, VOCABULARY.codebook_size)
EOS_ID = 2
DISTINCT = 8
SAMPLED_SECONDS = 0.05


def write_set(folder: Path, documents: int, shard_documents: int) -> None:
    """A set of `documents` in shards of `shard_documents`, of which `DISTINCT` differ."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [write_shard(folder / f"distinct-{number}.arrow", shard_documents, number) for number in range(DISTINCT)]
    shards: list[ShardRecord] = []
    for number in range(documents // shard_documents):
        name = f"shard-{number:05d}.arrow"
        (folder / name).hardlink_to(folder / records[number % DISTINCT].name)
        shards.append(dataclasses.replace(records[number % DISTINCT], name=name))
    write_manifest(folder, shards)


def write_shard(path: Path, documents: int, seed: int) -> ShardRecord:
    rng = np.random.default_rng(seed)
    lengths = lavit_lengths(documents, seed) - 3
    codes = (lengths * 0.82).astype(np.int64)
    return write_id_shard(
        path,
        [
            IdDocument(
                key=f"{seed:02d}{index:08d}",
                caption_index=0,
                segments=[
                    (IMAGE, rng.integers(0, VOCABULARY.codebook_size, count)),
                    (TEXT, rng.integers(0, VOCABULARY.text_size, length - count)),
                ],
                keep_mask=b"",
                caption="",
                source=("", 0, 0),
            )
            for index, (length, count) in enumerate(zip(lengths.tolist(), codes.tolist(), strict=True))
        ],
        encoding=ENCODING,
        inputs=(),
    )


def start(folder: Path, plans: Path, seq_len: int) -> None:
    """What each start does: prints, as JSON, the seconds to the plan and to the first row, and what the plan says."""
    begun = time.perf_counter()
    rows = RowDataset(load_manifest(folder), VOCABULARY, EOS_ID, seq_len, 0, 0.1, verify=False, plans=plans)
    planned = time.perf_counter()
    rows.row_tokens(0)
    first_row = time.perf_counter()
    num_rows = rows.rows_before_epoch(1)
    facts = {
        "plan_seconds": planned - begun,
        "row_seconds": first_row - planned,
        "documents": rows.num_documents,
        "rows": num_rows,
    }
    print(json.dumps(facts))


def run_start(folder: Path, plans: Path, seq_len: int) -> dict[str, float]:
    """A start in a process of its own; what it printed, and the peak of its own memory in bytes."""
    command = [sys.executable, __file__, "--start", str(folder), str(plans), "--seq-len", str(seq_len)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        own = 0
        while process.poll() is None:
            own = max(own, own_memory(process.pid))
            time.sleep(SAMPLED_SECONDS)
        assert process.stdout is not None
        facts: dict[str, float] = json.loads(process.stdout.read())
    return facts | {"own_bytes": own}


def own_memory(pid: int) -> int:
    """Resident bytes of a process that no file backs."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[4_000_000, 40_000_000, 400_000_000])
    parser.add_argument("--shard-documents", type=int, default=100_000)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--start", type=Path, nargs=2, help="be one start: the set's folder, and that of plans")
    arguments = parser.parse_args()
    if arguments.start:
        start(*arguments.start, arguments.seq_len)
        return
    print("| documents | plan | seconds to the plan | seconds to the first row | own memory at most | rows |")
    print("| --- | --- | --- | --- | --- | --- |")
    for documents in arguments.documents:
        with tempfile.TemporaryDirectory() as folder:
            write_set(Path(folder), documents, arguments.shard_documents)
            for plan in ("made", "at hand"):
                facts = run_start(Path(folder), Path(folder) / "plans", arguments.seq_len)
                seconds = f"{facts['plan_seconds']:.2f} | {facts['row_seconds']:.2f}"
                print(
                    f"| {documents:,} | {plan} | {seconds} | {facts['own_bytes'] / 2**20:,.0f} MiB | {facts['rows']:,.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
