"""How much of a row is useful: our packing against best-fit decreasing, next-fit, and padding a batch to its longest document.

    python benchmarks/packing.py [--documents N] [--seq-len L]

Lengths are LaVIT-like (90 codes and 18 text ids on average). All rivals get the same documents in the same run; figures are shares of
slots that hold a token, and the ratio of each rival to ours.
"""

import argparse
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from lavit_dist.data.packing import pack

BLOCK = 65_536
"""Documents that are packed together, as in training."""
PADDED_BATCH = 16
"""Documents in a padded batch."""


def lavit_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Lengths of `count` pairs: codes, caption, [IMG], [/IMG] and EOS."""
    rng = np.random.default_rng(seed)
    codes = rng.normal(90, 22, count).clip(20, 200)
    text = rng.lognormal(np.log(16), 0.5, count).clip(3, 80)
    return (codes + text).astype(np.int64) + 3


def packed(lengths: np.ndarray, seq_len: int) -> float:
    rows = sum(int(pack(lengths[at : at + BLOCK], seq_len).max()) + 1 for at in range(0, len(lengths), BLOCK))
    return lengths.sum() / (rows * seq_len)


def best_fit_decreasing(lengths: np.ndarray, seq_len: int) -> float:
    """Blocks as ours: the longest first, each into the row with the least room that takes it, as OLMo-core and NeMo do."""
    rows = 0
    for at in range(0, len(lengths), BLOCK):
        rooms = [0] * (seq_len + 1)
        occupied = 0
        for length in sorted(lengths[at : at + BLOCK].tolist(), reverse=True):
            fitting = occupied >> length
            room = length + (fitting & -fitting).bit_length() - 1 if fitting else seq_len
            if fitting:
                rooms[room] -= 1
                occupied ^= (rooms[room] == 0) << room
            else:
                rows += 1
            rooms[room - length] += 1
            occupied |= (room > length) << (room - length)
    return lengths.sum() / (rows * seq_len)


def next_fit(lengths: np.ndarray, seq_len: int) -> float:
    rows, room = 1, seq_len
    for length in lengths.tolist():
        if length > room:
            rows, room = rows + 1, seq_len
        room -= length
    return lengths.sum() / (rows * seq_len)


def padded(lengths: np.ndarray, _: int) -> float:
    batches = lengths[: len(lengths) // PADDED_BATCH * PADDED_BATCH].reshape(-1, PADDED_BATCH)
    return batches.sum() / (batches.max(1).sum() * PADDED_BATCH)


def main() -> None:
    parser = argparse.ArgumentParser(description="Useful share of slots: packing against padding.")
    parser.add_argument("--documents", type=int, default=4 * BLOCK)
    parser.add_argument("--seq-len", type=int, nargs="+", default=[1024, 2048, 4096])
    arguments = parser.parse_args()
    lengths = lavit_lengths(arguments.documents)
    packed(lengths[:100], 1024)  # compiles
    for seq_len in arguments.seq_len:
        compare(lengths, seq_len)


def compare(lengths: np.ndarray, seq_len: int) -> None:
    table = Table("method", "padding", "useful slots, ours / this", "seconds per million documents")
    ours = None
    for name, method in (
        ("ours", packed),
        ("best-fit decreasing", best_fit_decreasing),
        ("next-fit", next_fit),
        (f"padded batches of {PADDED_BATCH}", padded),
    ):
        start = time.perf_counter()
        share = method(lengths, seq_len)
        seconds = (time.perf_counter() - start) / len(lengths) * 1e6
        ours = ours or share
        table.add_row(name, f"{1 - share:.2%}", f"{ours / share:.4f}", f"{seconds:.3f}")
    print(
        f"{len(lengths):,} documents, mean {lengths.mean():.1f}, 99th percentile {np.percentile(lengths, 99):.0f}, rows of {seq_len}"
    )
    Console().print(table)


if __name__ == "__main__":
    main()
