"""How much of a row is useful: best-fit packing against padding a batch to its longest document, and against next-fit.

    python benchmarks/packing.py [--documents N] [--seq-len L]

Lengths are LaVIT-like (90 codes and 18 text ids on average). All rivals get the same documents in the same run; figures are shares of
slots that hold a token, and the ratio of each rival to ours.
"""

import argparse
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from lavit_dist.data.packing import best_fit_decreasing

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
    rows = sum(int(best_fit_decreasing(lengths[at : at + BLOCK], seq_len).max()) + 1 for at in range(0, len(lengths), BLOCK))
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
    parser.add_argument("--seq-len", type=int, default=2048)
    arguments = parser.parse_args()
    lengths = lavit_lengths(arguments.documents)
    table = Table("method", "useful slots", "ours / this", "seconds per million documents")
    ours = None
    for name, method in (
        ("best-fit packing (ours)", packed),
        ("next-fit", next_fit),
        (f"padded batches of {PADDED_BATCH}", padded),
    ):
        start = time.perf_counter()
        share = method(lengths, arguments.seq_len)
        seconds = (time.perf_counter() - start) / len(lengths) * 1e6
        ours = ours or share
        table.add_row(name, f"{share:.2%}", f"{ours / share:.3f}", f"{seconds:.2f}")
    Console().print(f"{len(lengths):,} documents, mean {lengths.mean():.1f}, rows of {arguments.seq_len}", table)


if __name__ == "__main__":
    main()
