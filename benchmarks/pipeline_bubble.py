"""How long pipeline stages stand idle, beside (P - 1) / (M + P - 1), the least for P equal stages and M micro-batches.

    python benchmarks/pipeline_bubble.py [--stages 2 4] [--micro-batches 4 8 16] [--output benchmarks/pipeline_bubble.md]

Every instruction of DeepSpeed's schedule is timed on every stage of a training step: by the clock, and in processor time. "Clock" is
the share of time, from the first forward pass to the last backward pass of any stage, in which a stage neither computed nor loaded; it
means something where each stage has a core of its own. "Replayed" follows what each stage did in its order, with the processor time
of each computation and free, instant messages: once as measured, and once with all stages as slow as their mean, which leaves the
schedule alone.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lavit_rows import LavitBatches
from ranks import run_ranks
from tables import tell

from lavit_dist.config.model import LlamaConfig
from lavit_dist.config.pretrain import ParallelConfig, PretrainConfig
from lavit_dist.config.training import OptimizerConfig
from lavit_dist.models.vocabulary import Vocabulary
from lavit_dist.parallel.topology import Layout

VOCABULARY = Vocabulary(text_size=1_000, codebook_size=512)
MODEL = LlamaConfig(
    hidden_size=384, num_layers=8, num_attention_heads=6, num_key_value_heads=6, ffn_hidden_size=1024, max_position_embeddings=512
)
COMPUTE = ("LoadMicroBatch", "ForwardPass", "BackwardPass")
MESSAGES = {"RecvActivation": ("SendActivation", -1), "RecvGrad": ("SendGrad", 1)}
"""What is received, and from which instruction of the stage how much further."""
STEPS = 3
"""The last is timed."""


class Instruction(NamedTuple):
    """One entry of a stage's schedule, in seconds."""

    name: str
    start: float
    end: float
    processor: float


def pretrain_config(stages: int, micro_batches: int) -> PretrainConfig:
    return PretrainConfig(
        run_dir="",
        ids="",
        text_tokenizer="",
        model=MODEL,
        parallel=ParallelConfig(pipeline_parallel_size=stages, zero_stage=0),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=0, schedule="constant"),
        total_steps=STEPS,
        global_batch_size=micro_batches,
        micro_batch_size=1,
        seq_len=MODEL.max_position_embeddings,
        precision="fp32",
        num_threads=1,
    )


def time_this_stage(stages: int, micro_batches: int, folder: Path) -> None:
    """A rank's process: leaves in `folder` the instructions of the last step."""
    from lavit_dist.parallel.distributed import barrier, rank
    from lavit_dist.parallel.topology import start_model_parallel

    config = pretrain_config(stages, micro_batches)
    layout = Layout(1, stages, 1)
    start_model_parallel(layout, config.num_threads)
    from deepspeed.runtime.pipe.engine import PipelineEngine

    from lavit_dist.engine.pretraining import Pretraining

    done: list[Instruction] = []

    def timed(name: str, execute: Any) -> Any:
        def run(engine: Any, *args: Any, **kwargs: Any) -> None:
            start, processor = time.perf_counter(), time.process_time()
            execute(engine, *args, **kwargs)
            done.append(Instruction(name, start, time.perf_counter(), time.process_time() - processor))

        return run

    training = Pretraining(config, layout, LavitBatches(config.global_batch_size, config.seq_len, VOCABULARY))
    PipelineEngine._INSTRUCTION_MAP = {of: timed(of.__name__, execute) for of, execute in PipelineEngine._INSTRUCTION_MAP.items()}
    for step in range(STEPS):
        done.clear()
        barrier()
        training.train_step(step)
    (folder / f"{rank()}.json").write_text(json.dumps(done))


def replay(stages: Sequence[Sequence[Instruction]], *, alike: bool) -> float:
    """The idle share of stages that do their instructions in order, each receiving when the other side has sent."""
    means = {
        name: statistics.mean(of.processor for stage in stages for of in stage if of.name == name)
        for name in ("ForwardPass", "BackwardPass")
    }
    clocks, at = [0.0] * len(stages), [0] * len(stages)
    sent: dict[tuple[int, str], list[float]] = {}
    received: dict[tuple[int, str], int] = {}
    busy = 0.0
    while any(position < len(stage) for position, stage in zip(at, stages, strict=True)):
        for number, stage in enumerate(stages):
            while at[number] < len(stage):
                name = stage[at[number]].name
                if name in MESSAGES:
                    of, further = MESSAGES[name]
                    messages, count = sent.get((number + further, of), []), received.get((number, name), 0)
                    if count == len(messages):
                        break
                    clocks[number] = max(clocks[number], messages[count])
                    received[number, name] = count + 1
                elif name in COMPUTE:
                    seconds = means.get(name, 0.0) if alike else stage[at[number]].processor
                    clocks[number] += seconds
                    busy += seconds
                else:
                    sent.setdefault((number, name), []).append(clocks[number])
                at[number] += 1
    return 1 - busy / (len(stages) * max(clocks))


def measure(stages: int, micro_batches: int) -> list[list[Instruction]]:
    """What each stage did between the first forward pass and the last backward pass."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(__file__, stages, "--rank-of", str(stages), str(micro_batches), "--folder", folder)
        told = [[Instruction(*of) for of in json.loads((Path(folder) / f"{rank}.json").read_text())] for rank in range(stages)]
    return [[of for of in stage if of.name in COMPUTE or of.name.startswith(("Recv", "Send"))] for stage in told]


def by_clock(stages: Sequence[Sequence[Instruction]]) -> float:
    computed = [of for stage in stages for of in stage if of.name in COMPUTE]
    span = max(of.end for of in computed) - min(of.start for of in computed)
    return 1 - sum(of.end - of.start for of in computed) / (len(stages) * span)


def imbalance(stages: Sequence[Sequence[Instruction]]) -> float:
    """Computation of the slowest stage over the mean."""
    busy = [sum(of.processor for of in stage if of.name in COMPUTE) for stage in stages]
    return max(busy) / statistics.mean(busy)


def report(arguments: argparse.Namespace) -> Iterator[str]:
    """The table in Markdown."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    cores = len(os.sched_getaffinity(0))
    yield "# Pipeline bubble\n"
    yield (
        f"`python benchmarks/pipeline_bubble.py`, {datetime.date.today():%-d %B %Y}, {cores} cores, one thread per stage, gloo, fp32,"
        f" commit {commit}. LLaMA of width {MODEL.hidden_size}, {MODEL.num_layers} layers, vocabulary {VOCABULARY.size:,};"
        f" micro-batches of {MODEL.max_position_embeddings} tokens.\n"
    )
    yield "| stages | micro-batches | (P - 1) / (M + P - 1) | replayed, stages alike | replayed as measured | clock | slowest stage / mean |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for stages in arguments.stages:
        for micro_batches in arguments.micro_batches:
            done = measure(stages, micro_batches)
            clock = f"{by_clock(done):.3f}" if stages <= cores else "more stages than cores"
            cells = [f"{(stages - 1) / (micro_batches + stages - 1):.3f}", f"{replay(done, alike=True):.3f}"]
            cells += [f"{replay(done, alike=False):.3f}", clock, f"{imbalance(done):.3f}"]
            yield f"| {stages} | {micro_batches} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--output", type=Path, help="write the table there, too")
    parser.add_argument("--rank-of", type=int, nargs=2, metavar=("STAGES", "MICRO_BATCHES"), help="be a stage")
    parser.add_argument("--folder", type=Path, help="where a stage leaves what it timed")
    arguments = parser.parse_args()
    if arguments.rank_of:
        time_this_stage(*arguments.rank_of, arguments.folder)
        return
    tell(report(arguments), arguments.output)


if __name__ == "__main__":
    main()
