"""The whole of training, one stage after another, each by its own entry point in its own processes.

RUN_DIR/quickstart.yaml    the resolved configuration
RUN_DIR/STAGE/             what each stage makes
RUN_DIR/logs/              what each stage said
RUN_DIR/stages.json        time and memory of each
RUN_DIR/report.html        what came out
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from lavit_dist.config.base import save_config
from lavit_dist.config.quickstart import QuickstartConfig
from lavit_dist.engine.run_folder import RunFolder, hold
from lavit_dist.errors import UserError
from lavit_dist.observe.process import run_watched
from lavit_dist.observe.stage_records import StageRecord, clock, gigabytes, read_stage_records, write_stage_records
from lavit_dist.parallel.distributed import free_port
from pipelines.quickstart_stages import Stage, plan_stages

ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
"""The quickstart is a job for CPU cores, on machines with GPUs too."""
INTERRUPTED = 130
"""Exit code after ctrl-C, as shells have it."""


def run(config: QuickstartConfig) -> None:
    """Runs the stages that aren't done, and exits with the code of one that fails."""
    stages = plan_stages(config)
    for stage in stages:
        RunFolder(stage.folder).check_config(stage.config)
    lock = hold(config.root)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, lambda number, _: sys.exit(128 + number))  # by way of run_watched, which ends the stage
    with lock:
        _run_stages(config, stages)


def _run_stages(config: QuickstartConfig, stages: Sequence[Stage]) -> None:
    save_config(config, config.root / "quickstart.yaml")
    console = Console(highlight=False, soft_wrap=True)
    made: Stage | None = None
    for number, stage in enumerate(stages, 1):
        console.print(f"\n[bold]\\[{number}/{len(stages)}] {stage.title}[/bold]")
        was_done = stage.done
        if was_done and not stage.depends_on_outside:
            if made:
                raise UserError(
                    f"{stage.folder} is older than {made.folder}, which was made just now and which it should be made from;"
                    f" remove {stage.folder} and run this again."
                )
            console.print(f"already there: {stage.folder}")
            continue
        _run_stage(stage, config.root, console, counted=not was_done)
        made = made if was_done else stage
    _print_summary(stages, config.root, console)


def _run_stage(stage: Stage, root: Path, console: Console, *, counted: bool) -> None:
    """Runs the stage; if `counted`, its time and memory go to the records, those of an attempt that was cut short too."""
    log = root / "logs" / f"{stage.name}.log"
    variables = {**ENVIRONMENT, **_threads(stage)}
    records = read_stage_records(root)
    alone = " ".join([*(f"{key}={value}" for key, value in variables.items()), shlex.join(stage.command)])
    record = records.get(stage.name, StageRecord(title=stage.title, command=alone))
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **variables}
    start = time.perf_counter()
    try:
        finished = run_watched(_executable(stage), log, environment, lambda line: console.print(line, markup=False))
    except KeyboardInterrupt:
        if counted:
            write_stage_records(root, {**records, stage.name: record.after(time.perf_counter() - start, 0)})
        console.print(f"\nInterrupted in the stage [bold]{stage.title}[/bold]; the same command goes on from there.")
        sys.exit(INTERRUPTED)
    if counted:
        write_stage_records(root, {**records, stage.name: record.after(finished.seconds, finished.peak_memory)})
    if finished.returncode:
        console.print(f"\n[bold red]The stage {stage.title} failed with exit code {finished.returncode}.[/bold red]")
        console.print(f"its log:   {log}\nit alone:  {alone}", markup=False)
        sys.exit(finished.returncode if finished.returncode > 0 else 128 - finished.returncode)


def _threads(stage: Stage) -> dict[str, str]:
    """Each of several processes takes its share of the cores."""
    return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // stage.processes))} if stage.processes else {}


def _executable(stage: Stage) -> list[str]:
    """The command with this environment's programs, and for deepspeed a port that no other run holds."""
    name, *rest = stage.command
    program = str(Path(sys.executable).with_name(name))
    return [program, "--master_port", str(free_port()), *rest] if stage.processes else [program, *rest]


def _print_summary(stages: Sequence[Stage], root: Path, console: Console) -> None:
    records = read_stage_records(root)
    table = Table(box=None, header_style="bold", show_footer=True)
    done = [records[stage.name] for stage in stages if stage.name in records]
    seconds, peak = sum(record.seconds for record in done), max((record.peak_memory for record in done), default=0)
    table.add_column("stage", footer="[bold]in all[/bold]")
    table.add_column("time", justify="right", footer=f"[bold]{clock(seconds)}[/bold]")
    table.add_column("peak memory", justify="right", footer=f"[bold]{gigabytes(peak)}[/bold]")
    table.add_column("folder", overflow="fold")
    for stage in stages:
        record = records.get(stage.name)
        cells = (clock(record.seconds), gigabytes(record.peak_memory)) if record else ("", "")
        table.add_row(stage.title, *cells, stage.folder)
    console.print()
    console.print(table)
    console.print(f"\nLook at {stages[-1].products[0]}")
