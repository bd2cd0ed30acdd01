"""What LLaMA-7B should reach on 8 to 1,024 GPUs, by `lavit_dist.parallel.scaling_model`; its traffic is checked against counts.

    python benchmarks/scaling.py [--config configs/lavit-7b/pretrain.yaml] [--no-check] [--output benchmarks/scaling.md]

Nothing here was measured on GPUs: rates and efficiency are assumptions, written above the tables.
"""

import argparse
import datetime
import subprocess
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from communication import VOCABULARY, measure, pretrain_config
from lavit_rows import LAVIT, LavitBatches
from tables import tell

from lavit_dist.config.base import load_config
from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.parallel.communication_cost import StepSizes, stages_of
from lavit_dist.parallel.scaling_model import Machine, StepTime, memory_bytes, stage_flops, step_time
from lavit_dist.parallel.stages import layer_costs, partition
from lavit_dist.parallel.topology import Layout

H100 = Machine(
    peak_flops=989e12,
    efficiency=0.60,
    memory_bytes=80e9,
    memory_bandwidth=3.35e12,
    node_size=8,
    node_bandwidth=360e9,
    network_bandwidth=40e9,
    node_latency=4e-6,
    network_latency=12e-6,
)
ASSUMPTIONS = f"""\
Assumptions, none of them measured here: {H100.peak_flops / 1e12:.0f} TFLOP/s (H100 and H200, dense bf16), of which one GPU by itself
reaches {H100.efficiency:.0%}; {H100.node_size} GPUs per node; NVLink sends {H100.node_bandwidth / 1e9:.0f} GB/s per GPU (80 % of 450)
and {H100.node_latency * 1e6:.0f} us per message, InfiniBand {H100.network_bandwidth / 1e9:.0f} GB/s per GPU (80 % of 400 Gb/s) and
{H100.network_latency * 1e6:.0f} us; memory {H100.memory_bandwidth / 1e12:.2f} TB/s, of which a layout may fill 90 % of
{H100.memory_bytes / 1e9:.0f} GB by the model's estimate. Nothing overlaps, no activations are recomputed, rows are as full as in
`packing.md` and loading is free. MFU counts 6 operations per weight and token, and attention within documents.
"""
ROWS_PER_GPU = 32
"""Rows of a step per GPU in the table of weak scaling."""
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
CHECKED = ("d1z1", "t2z1", "p2z1", "d2z1", "t2p2z1", "d4z1", "t2p2d2z1", "d8z1")
FILLED = 0.9
"""Share of a GPU's memory that a layout may take."""


class Prediction(NamedTuple):
    """What the model says of a layout."""

    layout: Layout
    sizes: StepSizes
    time: StepTime
    mfu: float
    memory: float


def predict(config: PretrainConfig, layout: Layout, rows: int, micro_batch_size: int, mean_context: float) -> Prediction | None:
    """None where `rows` can't be shared out in micro-batches of that size."""
    micro_batches, rest = divmod(rows, layout.data_size * micro_batch_size)
    if rest or not micro_batches:
        return None
    sizes = StepSizes(
        model=config.model,
        vocabulary_size=sum(table.padded_size for table in LAVIT.tables),
        micro_batch_tokens=micro_batch_size * config.seq_len,
        micro_batches=micro_batches,
        element_bytes=2,
        zero_stage=config.parallel.zero_stage,
    )
    costs = layer_costs(config.model, LAVIT.size, config.seq_len, config.activation_checkpointing)
    stages = stages_of(partition(costs, layout.pipe_size))
    time = step_time(sizes, layout, stages, H100, mean_context)
    flops = sum(stage_flops(sizes, stage, mean_context) for stage in stages) * micro_batches * layout.data_size
    mfu = flops / time.total / H100.peak_flops / layout.world_size
    return Prediction(layout, sizes, time, mfu, memory_bytes(sizes, layout, stages))


def best(config: PretrainConfig, gpus: int, rows: int, mean_context: float) -> Prediction:
    """The fastest layout that fits into memory."""
    found = []
    for tensor, pipe, micro_batch in product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4)):
        if gpus % (tensor * pipe) == 0:
            prediction = predict(config, Layout(tensor, pipe, gpus // (tensor * pipe)), rows, micro_batch, mean_context)
            if prediction is not None and prediction.memory <= FILLED * H100.memory_bytes:
                found.append(prediction)
    return max(found, key=lambda of: of.mfu)


def row(prediction: Prediction, config: PretrainConfig, rows: int, reference: float) -> str:
    time, layout = prediction.time, prediction.layout
    speed = rows * config.seq_len / time.total / layout.world_size
    micro_batch = prediction.sizes.micro_batch_tokens // config.seq_len
    cells = [f"{layout.world_size:,}", f"{layout.tensor_size} x {layout.pipe_size} x {layout.data_size}", f"{rows:,}"]
    cells += [f"{prediction.sizes.micro_batches} x {micro_batch}", f"{time.total:.2f}"]
    cells += [f"{part / time.total:.1%}" for part in time]
    cells += [f"{speed:,.0f}", f"{prediction.mfu:.1%}", f"{speed / reference:.1%}", f"{prediction.memory / 1e9:.0f}"]
    return "| " + " | ".join(cells) + " |"


HEADER = (
    "| GPUs | tensor x pipeline x data | rows | micro-batches | step s | compute | tensor | pipe | bubble | data | optimizer |"
    " tokens/s/GPU | MFU | of 8 GPUs | GB |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def table(config: PretrainConfig, mean_context: float, rows_of: dict[int, int], *, searched: bool) -> Iterator[str]:
    yield HEADER
    reference = None
    tensor, pipe = config.parallel.tensor_parallel_size, config.parallel.pipeline_parallel_size
    for gpus, rows in rows_of.items():
        if searched:
            prediction: Prediction | None = best(config, gpus, rows, mean_context)
        else:
            layout = Layout(tensor, pipe, gpus // (tensor * pipe))
            prediction = predict(config, layout, rows, config.micro_batch_size, mean_context)
        if prediction is not None:
            reference = reference or rows * config.seq_len / prediction.time.total / gpus
            yield row(prediction, config, rows, reference)
    yield ""


def check(names: Sequence[str]) -> Iterator[str]:
    """The model's bytes beside those that gloo processes sent."""
    yield "| processes | tensor x pipeline x data | ZeRO | model, MB per rank | counted, MB per rank | counted / model |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name in names:
        config, layout = pretrain_config(name)
        counted = measure(name)
        sent, least = sum(map(counted.by_axis, counted.sent)), sum(counted.least)
        ratio = f"{sent / least:.3f}" if least else "-"
        sizes = f"{layout.tensor_size} x {layout.pipe_size} x {layout.data_size}"
        yield f"| {layout.world_size} | {sizes} | {config.parallel.zero_stage} | {least / 1e6:.2f} | {sent / 1e6:.2f} | {ratio} |"
    yield ""


def report(arguments: argparse.Namespace) -> Iterator[str]:
    """All tables in Markdown."""
    config = load_config(PretrainConfig, arguments.config, ["run_dir=run", "ids=ids", "text_tokenizer=llama"])
    lengths = [len(document) for document in LavitBatches(64, config.seq_len).documents]
    mean_context = sum(length * (length + 1) / 2 for length in lengths) / sum(lengths)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    yield "# Scaling, by a model\n"
    yield f"`python benchmarks/scaling.py`, {datetime.date.today():%-d %B %Y}, commit {commit}, for `{arguments.config}`.\n"
    yield ASSUMPTIONS
    if arguments.check:
        yield f"## Traffic of the model beside counts\n\nLLaMA of `communication.py`, vocabulary {VOCABULARY.size:,}, on gloo processes.\n"
        yield from check(CHECKED)
    weak = {gpus: ROWS_PER_GPU * gpus for gpus in GPUS}
    fixed = dict.fromkeys(GPUS, config.global_batch_size)
    yield f"## Weak scaling, {ROWS_PER_GPU} rows per GPU, the configured layout\n"
    yield from table(config, mean_context, weak, searched=False)
    yield f"## Weak scaling, {ROWS_PER_GPU} rows per GPU, the fastest layout that fits\n"
    yield from table(config, mean_context, weak, searched=True)
    yield f"## {config.global_batch_size:,} rows in every step, the configured layout\n"
    yield from table(config, mean_context, fixed, searched=False)
    yield f"## {config.global_batch_size:,} rows in every step, the fastest layout that fits\n"
    yield from table(config, mean_context, fixed, searched=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/lavit-7b/pretrain.yaml"))
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", type=Path, help="write the tables there, too")
    arguments = parser.parse_args()
    tell(report(arguments), arguments.output)


if __name__ == "__main__":
    main()
