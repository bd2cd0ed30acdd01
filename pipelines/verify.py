"""Proof of a port or a conversion: reference vectors tensor by tensor, a LLaMA in a parallel layout document by document."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lavit_dist.checkpoint.llama_folder import LlamaFolder
from lavit_dist.checkpoint.reference import is_reference_folder
from lavit_dist.config.base import build, to_dict
from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.errors import check
from lavit_dist.evaluation.llama_check import LIMIT, check_llama, llama_vocabulary
from lavit_dist.evaluation.reference_check import ReferenceCheck, check_reference
from lavit_dist.observe.logs import setup_logging
from lavit_dist.parallel.topology import Layout


def reference(folder: str) -> bool:
    """Prints a table of differences from the reference in `folder`; returns whether there are none that matter."""
    check(
        is_reference_folder(Path(folder)),
        f"{folder} is no folder of reference vectors: it has neither vectors.safetensors nor visual_tokenizer/; name one that has.",
    )
    result = check_reference(Path(folder))
    _print(result, folder)
    return result.ok


def hf(folder: str, tensor: int, pipeline: int) -> bool:
    """Prints a table of differences between the LLaMA in `folder`, cut for tensor x pipeline processes, and transformers' own."""
    setup_logging()
    check(tensor >= 1 and pipeline >= 1, f"--tensor {tensor} and --pipeline {pipeline} must be at least 1.")
    opened = LlamaFolder(folder)
    parallel = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
    run = {"run_dir": "", "ids": "", "text_tokenizer": "", "total_steps": 1, "global_batch_size": 1, "micro_batch_size": 1}
    length = {"seq_len": opened.config.max_position_embeddings}
    build(PretrainConfig, run | length | {"model": to_dict(opened.config), "parallel": parallel})  # refuses what can't be cut so
    layout = Layout(tensor, pipeline, 1)
    layout.check_vocabulary(llama_vocabulary(opened))
    console, table = _console_and_table("row", "document", "tokens", "largest logit", "difference", "limit", "")
    differences = check_llama(opened, layout)
    for found in differences:
        figures = (f"{found.largest:.2f}", f"{found.difference:.1e}", f"{LIMIT:.0e}")
        table.add_row(str(found.row), str(found.document), str(found.tokens), *figures, _verdict(found.ok))
    console.print(table)
    failed = sum(not found.ok for found in differences)
    total = f"{failed} of {len(differences)} documents FAIL" if failed else "equal to LlamaForCausalLM"
    console.print(Text(f"{folder}, tensor {tensor} x pipeline {pipeline}: {total}", "bold"))
    return not failed


def _print(result: ReferenceCheck, folder: str) -> None:
    console, table = _console_and_table("tensor or file", "reference", "difference", "limit", "")
    for row in result.rows:
        table.add_row(*(Text(cell) for cell in (row.name, row.reference, row.measured, row.limit)), _verdict(row.ok))
    console.print(table)
    for note in result.notes:
        console.print(Text(f"note: {note}"))
    failed = sum(not row.ok for row in result.rows)
    console.print(Text(f"{folder}: {'reproduced' if result.ok else f'{failed} of {len(result.rows)} rows FAIL'}", "bold"))


def _console_and_table(*titles: str) -> tuple[Console, Table]:
    table = Table(box=None, header_style="bold")
    for title in titles:
        table.add_column(title, overflow="fold", no_wrap=title != "difference")
    return Console(highlight=False), table


def _verdict(ok: bool) -> Text:
    return Text("ok", "green") if ok else Text("FAIL", "bold red")
