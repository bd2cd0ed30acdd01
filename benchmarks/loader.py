"""Tokens per second that one process reads training rows with, beside megatron-core's GPTDataset over the same documents.

    python benchmarks/loader.py [--documents 200000] [--seq-len 2048] [--rows 2000]

Both sides read from memory-mapped files made in the same run, shuffled over the whole set, in micro-batches of `MICRO_BATCH` rows; GPTDataset
concatenates documents and cuts them where a row ends, ours packs them whole. "With positions" has GPTDataset restart position ids at
each document, as packed attention needs and ours always does; it makes no attention mask and knows no modalities, ours gives document ids
and modalities too. One thread each, in turns, processor time of the best turn.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from packing_plan import EOS_ID, VOCABULARY, write_set
from tables import tell

from lavit_dist.data.global_batches import GlobalBatches
from lavit_dist.data.manifest import load_manifest
from lavit_dist.data.rows import RowDataset

MICRO_BATCH = 8
TURNS = 5


def megatron_dataset(
    rows: RowDataset, folder: Path, seq_len: int, *, reset: bool
) -> "torch.utils.data.Dataset[dict[str, torch.Tensor]]":
    """GPTDataset over all documents of the first epoch of `rows`."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
    from megatron.core.datasets.utils import Split

    prefix = folder / "megatron"
    if not prefix.with_suffix(".idx").exists():
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        for row in range(rows.rows_before_epoch(1)):
            for document in rows.row_tokens(row):
                builder.add_document(document, [len(document)])
        builder.finalize(f"{prefix}.idx")
    tokenizer = SimpleNamespace(vocab_size=VOCABULARY.size, eod=EOS_ID, pad=-1, unique_identifiers={}, unique_id="none")
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=seq_len,
        split="1,0,0",
        path_to_cache=str(folder / "cache"),
        tokenizer=tokenizer,
        reset_position_ids=reset,
        reset_attention_mask=reset,
        eod_mask_loss=True,
        create_attention_mask=False,
    )
    indexed = IndexedDataset(str(prefix), multimodal=False, mmap=True)
    return GPTDataset(indexed, str(prefix), np.arange(len(indexed.document_indices) - 1), None, Split.train, config)


def ours(rows: RowDataset, steps: int) -> int:
    batches = GlobalBatches(rows, MICRO_BATCH)
    return sum(batch.tokens.numel() for step in range(steps) for batch in batches.micro_batches(step, 0, 1, MICRO_BATCH))


def theirs(dataset: "torch.utils.data.Dataset[dict[str, torch.Tensor]]", steps: int) -> int:
    tokens = 0
    for step in range(steps):
        rows = [dataset[row] for row in range(step * MICRO_BATCH, (step + 1) * MICRO_BATCH)]
        tokens += torch.utils.data.default_collate(rows)["tokens"].numel()
    return tokens


def report(documents: int, seq_len: int, num_rows: int) -> Iterator[str]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_set(folder / "ids", documents, documents // 8)
        rows = RowDataset(load_manifest(folder / "ids"), VOCABULARY, EOS_ID, seq_len, 0, 0.0, verify=False)
        steps = min(num_rows, rows.rows_before_epoch(1)) // MICRO_BATCH
        sides: dict[str, Callable[[], int]] = {
            "ours": partial(ours, rows, steps),
            "GPTDataset, with positions": partial(theirs, megatron_dataset(rows, folder, seq_len, reset=True), steps),
            "GPTDataset, without": partial(theirs, megatron_dataset(rows, folder, seq_len, reset=False), steps),
        }
        best = dict.fromkeys(sides, 0.0)
        for _ in range(TURNS):
            for side, read in sides.items():
                start = time.process_time()
                tokens = read()
                best[side] = max(best[side], tokens / (time.process_time() - start))
    yield f"{documents:,} documents, rows of {seq_len}, {steps * MICRO_BATCH} rows\n"
    yield "| side | M tokens/s | ours / this |"
    yield "| --- | --- | --- |"
    for side, rate in best.items():
        yield f"| {side} | {rate / 1e6:.2f} | {best['ours'] / rate:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--output", type=Path, help="write the table there, too")
    arguments = parser.parse_args()
    tell(report(arguments.documents, arguments.seq_len, arguments.rows), arguments.output)


if __name__ == "__main__":
    main()
