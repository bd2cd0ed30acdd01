"""Bytes that ranks send in a training step, counted, beside the least that the layout asks for.

    python benchmarks/communication.py [--layouts t2p2z1 d4z2 ...] [--output benchmarks/communication.md]

A layout is written as its sizes: t tensor, p pipeline, d data, z ZeRO stage, s1 sequence parallel,
s2 the same with gather_twice; bf16, but fp32 at stage 0. Each runs on as many gloo processes of this machine; the second step is
counted. The least is `lavit_dist.parallel.communication_cost`'s.
"""

import argparse
import datetime
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lavit_rows import LavitBatches
from ranks import run_ranks
from tables import tell

from lavit_dist.config.model import LlamaConfig
from lavit_dist.config.pretrain import ParallelConfig, PretrainConfig
from lavit_dist.config.training import OptimizerConfig
from lavit_dist.models.vocabulary import Vocabulary
from lavit_dist.parallel.communication_cost import StepSizes, Traffic, least_traffic, stages_of
from lavit_dist.parallel.stages import layer_costs, partition
from lavit_dist.parallel.topology import Layout

VOCABULARY = Vocabulary(text_size=1_000, codebook_size=512)
MODEL = LlamaConfig(
    hidden_size=512, num_layers=4, num_attention_heads=8, num_key_value_heads=8, ffn_hidden_size=1376, max_position_embeddings=512
)
MICRO_BATCHES = 2
LAYOUTS = (
    *("t2z1", "t2z1s1", "t2z1s2", "p2z1", "d2z0", "d2z1", "d2z2", "d2z3"),
    *("t2p2z1", "t2d2z1", "t2d2z3", "p2d2z0", "p2d2z1", "p4z1", "d4z1", "d4z2", "d4z3"),
    *("t2p2d2z1", "t4d2z2", "d8z1"),
)


class Counted(NamedTuple):
    """What a layout's ranks sent on the mean, in bytes."""

    sent: dict[str, dict[str, float]]
    """By axis and operation."""
    least: Traffic

    def by_axis(self, axis: str) -> float:
        return sum(self.sent.get(axis, {}).values())

    @property
    def ratio(self) -> float:
        """All that was sent to the least."""
        return sum(map(self.by_axis, self.sent)) / sum(self.least)


def pretrain_config(name: str) -> tuple[PretrainConfig, Layout]:
    """The run of the layout so written, and its layout."""
    sizes = {axis: int(size) for axis, size in re.findall(r"([tpdzs])(\d+)", name)}
    layout = Layout(sizes.get("t", 1), sizes.get("p", 1), sizes.get("d", 1))
    config = PretrainConfig(
        run_dir="",
        ids="",
        text_tokenizer="",
        model=MODEL,
        parallel=ParallelConfig(
            tensor_parallel_size=layout.tensor_size,
            pipeline_parallel_size=layout.pipe_size,
            zero_stage=sizes["z"],
            sequence_parallel="s" in sizes,
            gather_twice=sizes.get("s") == 2,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=0, schedule="constant"),
        total_steps=2,
        global_batch_size=MICRO_BATCHES * layout.data_size,
        micro_batch_size=1,
        seq_len=MODEL.max_position_embeddings,
        precision="bf16" if sizes["z"] else "fp32",
        num_threads=1,
    )
    return config, layout


def count_on_this_rank(name: str, folder: Path) -> None:
    """A rank's process: leaves in `folder` what it sent in the second step, and its stage."""
    from collective_counter import CollectiveCounter

    from lavit_dist.parallel.distributed import rank
    from lavit_dist.parallel.topology import start_model_parallel

    config, layout = pretrain_config(name)
    start_model_parallel(layout, config.num_threads)
    from lavit_dist.engine.pretraining import Pretraining

    training = Pretraining(config, layout, LavitBatches(config.global_batch_size, config.seq_len, VOCABULARY))
    training.train_step(0)
    with CollectiveCounter(layout) as counter:
        training.train_step(1)
    facts = [[axis, operation, sent] for (axis, operation), sent in counter.sent.items()]
    (folder / f"{rank()}.json").write_text(json.dumps(facts))


def measure(name: str) -> Counted:
    """Counts on all ranks of a layout."""
    config, layout = pretrain_config(name)
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(__file__, layout.world_size, "--rank-of", name, "--folder", folder)
        facts = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(layout.world_size)]
    sent: dict[str, Counter[str]] = {}
    for axis, operation, count in (entry for of in facts for entry in of):
        sent.setdefault(axis, Counter())[operation] += count / layout.world_size
    sizes = StepSizes(
        model=MODEL,
        vocabulary_size=sum(table.padded_size for table in VOCABULARY.tables),
        micro_batch_tokens=config.seq_len * config.micro_batch_size,
        micro_batches=MICRO_BATCHES,
        element_bytes=2 if config.precision == "bf16" else 4,
        zero_stage=config.parallel.zero_stage,
    )
    costs = layer_costs(MODEL, VOCABULARY.size, config.seq_len, config.activation_checkpointing)
    # as many ranks on each stage
    least = [least_traffic(sizes, layout, stage) for stage in stages_of(partition(costs, layout.pipe_size))]
    mean = Traffic(*(sum(axis) / len(least) for axis in zip(*least, strict=True)))
    return Counted({axis: dict(counts) for axis, counts in sent.items()}, mean)


def report(names: list[str]) -> Iterator[str]:
    """The table in Markdown."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    yield "# Bytes sent in a step\n"
    yield (
        f"`python benchmarks/communication.py`, {datetime.date.today():%-d %B %Y}, gloo processes on one machine, commit {commit}."
        f" LLaMA of width {MODEL.hidden_size}, {MODEL.num_layers} layers, {MODEL.ffn_hidden_size} hidden, vocabulary"
        f" {VOCABULARY.size:,}; {MICRO_BATCHES} micro-batches of {MODEL.max_position_embeddings} tokens on each"
        " data-parallel rank; MB that a rank sends on the mean, as rings send them, and the ratio to the least.\n"
    )
    yield "| ranks | tensor | pipeline | data | ZeRO | precision | tensor MB | data MB | pipe MB | rest MB | sent / least | operations |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for name in names:
        config, layout = pretrain_config(name)
        counted = measure(name)
        cells = [
            layout.world_size,
            f"{layout.tensor_size}{_sequence(config.parallel)}",
            layout.pipe_size,
            layout.data_size,
            config.parallel.zero_stage,
            config.precision,
        ]
        cells += [axis_cell(counted, axis) for axis in Traffic._fields]
        operations = sorted({operation.strip("_") for axis in Traffic._fields for operation in counted.sent.get(axis, {})})
        cells += [f"{counted.by_axis('several') / 1e6:.3f}", f"{counted.ratio:.3f}", ", ".join(operations)]
        yield "| " + " | ".join(map(str, cells)) + " |"


def _sequence(parallel: ParallelConfig) -> str:
    return ", sequence, gathered twice" if parallel.gather_twice else ", sequence" if parallel.sequence_parallel else ""


def axis_cell(counted: Counted, axis: str) -> str:
    least, sent = getattr(counted.least, axis), counted.by_axis(axis)
    return f"{sent / 1e6:.2f} ({sent / least:.3f})" if least else f"{sent / 1e6:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS))
    parser.add_argument("--output", type=Path, help="write the table there, too")
    parser.add_argument("--rank-of", help="be a rank of this layout")
    parser.add_argument("--folder", type=Path, help="where a rank leaves what it counted")
    arguments = parser.parse_args()
    if arguments.rank_of:
        count_on_this_rank(arguments.rank_of, arguments.folder)
        return
    tell(report(arguments.layouts), arguments.output)


if __name__ == "__main__":
    main()
