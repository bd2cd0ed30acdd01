"""Useful tokens per second of a training step: our engine against transformers and megatron-core, on the same model and documents.

    python benchmarks/pretrain.py [--layers N --width W ...] [--precision fp32 bf16] [--output benchmarks/pretrain.md]

Each side trains in a process of its own, so that its peak memory is its own; the sides take turns, a step each, and one works at a
time. Ours and transformers' are there as they come and compiled by torch, and transformers' with freed memory kept, as ours keeps it. A
step is forward, backward, clipping and torch's fused AdamW over the same documents from the same weights; a first step, which isn't
counted, warms up and shows that all have the same loss. With one thread processor time is counted, which other work on the machine
doesn't stretch; `--neighbour` has other work slow memory down.
"""

import argparse
import contextlib
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lavit_rows import LavitBatches
from pretrain_sides import SIDES
from tables import tell
from tokenizer_inference import machine

from lavit_dist.config.model import LlamaConfig
from lavit_dist.config.pretrain import ParallelConfig, PretrainConfig
from lavit_dist.config.training import OptimizerConfig
from lavit_dist.engine.throughput import peak_memory_gib
from lavit_dist.models.llama import block_parameters

NEIGHBOUR = """
import torch
torch.set_num_threads(1)
some, others = torch.ones(2**27), torch.empty(2**27)
while True:
    others.copy_(some)
    some.add_(others).mul_(0.5)
"""
"""A program that leaves less of memory's bandwidth to others, as on a host that is shared: it only reads and writes 1 GiB."""
REPLY = "step: "
"""Begins the lines of a side's output that are its figures."""


def pretrain_config(arguments: argparse.Namespace, precision: str) -> PretrainConfig:
    return PretrainConfig(
        run_dir="",
        ids="",
        text_tokenizer="",
        model=LlamaConfig(
            hidden_size=arguments.width,
            num_layers=arguments.layers,
            num_attention_heads=arguments.heads,
            num_key_value_heads=arguments.heads,
            ffn_hidden_size=arguments.hidden,
            max_position_embeddings=arguments.seq_len,
        ),
        parallel=ParallelConfig(zero_stage=arguments.zero if precision == "fp32" else 1),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=0, schedule="constant"),
        total_steps=arguments.rounds + 1,
        global_batch_size=arguments.rows,
        micro_batch_size=arguments.micro_batch,
        seq_len=arguments.seq_len,
        precision=precision,
        num_threads=arguments.threads,
    )


def work(side: str, config: PretrainConfig, one_thread: bool) -> None:
    """A side's process: a step for each line of input."""
    step = SIDES[side](config, LavitBatches(config.global_batch_size, config.seq_len))
    clock = time.process_time if one_thread else time.perf_counter
    for _ in sys.stdin:
        start = clock()
        loss = step()
        print(REPLY + json.dumps({"seconds": clock() - start, "loss": loss, "memory_gib": peak_memory_gib()}), flush=True)


class Side:
    """Such a process, from outside."""

    def __init__(self, name: str, precision: str) -> None:
        command = [sys.executable, __file__, *sys.argv[1:], "--side", name, "--precision", precision]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.steps: list[dict[str, float]] = []

    def step(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(REPLY):
                self.steps.append(json.loads(line.removeprefix(REPLY)))
                return
        raise SystemExit(f"a side ended with exit code {self.process.wait()}")

    def close(self) -> None:
        self.process.communicate()

    @property
    def seconds(self) -> list[float]:
        """Of the steps that count."""
        return [step["seconds"] for step in self.steps[1:]]


def report(arguments: argparse.Namespace) -> Iterator[str]:
    """The tables in Markdown."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    batches, llama = LavitBatches(arguments.rows, arguments.seq_len), pretrain_config(arguments, "fp32").model
    table = batches.rows.vocabulary.size * llama.hidden_size
    weights = llama.num_layers * block_parameters(llama) + 2 * table
    clock = "processor time" if arguments.threads == 1 else "wall-clock time"
    yield "# Pretraining step\n"
    yield (
        f"`{' '.join(['python', *sys.argv])}`, {datetime.date.today():%-d %B %Y}, {arguments.threads} of {os.cpu_count()} cores of"
        f" {machine('cpu').split(' cores of ')[-1]}, commit {commit}. LLaMA of {weights / 1e6:.0f} M weights: width {llama.hidden_size},"
        f" {llama.num_layers} layers, {llama.num_attention_heads} heads, {llama.ffn_hidden_size} hidden, vocabulary"
        f" {batches.rows.vocabulary.size:,}. A step has {len(batches.documents)} documents, {batches.tokens:,} tokens, in"
        f" {arguments.rows} rows of {arguments.seq_len}, {arguments.micro_batch} at a time; medians of {arguments.rounds} steps of"
        f" {clock}, the sides taking turns{', beside a process that only reads and writes memory' if arguments.neighbour else ''}.\n"
    )
    for precision in arguments.precision:
        sides = {name: Side(name, precision) for name in arguments.sides}
        ours = [name for name in sides if name.startswith("ours")]
        for _ in range(arguments.rounds + 1):
            for side in sides.values():
                side.step()
        for side in sides.values():
            side.close()
        yield f"## {precision}\n"
        ratios = " | ".join(f"{name} / this" for name in ours)
        yield f"| side | useful tokens/s | best step | {ratios} | peak memory, GiB | loss of the first step |"
        yield "| --- " * (5 + len(ours)) + "|"
        for name, side in sides.items():
            yield row(name, side, [sides[name] for name in ours], batches.tokens)
        yield ""


def row(name: str, side: Side, references: list[Side], tokens: int) -> str:
    ratios = [
        statistics.median(theirs / ours for theirs, ours in zip(side.seconds, reference.seconds, strict=True))
        for reference in references
    ]
    cells: list[Any] = [
        name,
        f"{tokens / statistics.median(side.seconds):.0f}",
        f"{tokens / min(side.seconds):.0f}",
        *(f"{ratio:.2f}" for ratio in ratios),
    ]
    return "| " + " | ".join([*cells, f"{side.steps[-1]['memory_gib']:.2f}", f"{side.steps[0]['loss']:.5f}"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=4, help="rows of a step")
    parser.add_argument("--micro-batch", type=int, default=1, help="rows of a forward pass")
    parser.add_argument("--zero", type=int, default=1, help="ZeRO stage of our engine in fp32; it is 1 in bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--output", type=Path, help="write the tables there, too")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="which to compare")
    parser.add_argument("--neighbour", action="store_true", help="have another process read and write memory all the while")
    parser.add_argument("--side", choices=SIDES, help="be the process of this side")
    arguments = parser.parse_args()
    if arguments.side:
        work(arguments.side, pretrain_config(arguments, arguments.precision[0]), arguments.threads == 1)
        return
    with subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) if arguments.neighbour else contextlib.nullcontext() as neighbour:
        try:
            tell(report(arguments), arguments.output)
        finally:
            if neighbour is not None:
                neighbour.kill()


if __name__ == "__main__":
    main()
