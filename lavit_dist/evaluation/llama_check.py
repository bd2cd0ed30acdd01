"""A LLaMA folder in a parallel layout, against transformers' own model: logits of packed documents, each equal to it alone."""

from __future__ import annotations

import os
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from lavit_dist.checkpoint.llama_folder import LlamaFolder
from lavit_dist.checkpoint.llama_source import LlamaSource
from lavit_dist.data.micro_batch import PADDING_DOCUMENT, MicroBatch, lay_out
from lavit_dist.errors import UserError, check
from lavit_dist.models.vocabulary import Vocabulary
from lavit_dist.parallel.distributed import device, free_port
from lavit_dist.parallel.topology import Layout, start_model_parallel

LIMIT = 1e-4
"""Largest difference of a logit, fp32."""
ROWS, SEQ_LEN = 2, 256
SHORTEST, LONGEST = 1, 100
"""Tokens of a document."""
STAND_IN_CODES = 126
"""Codes that a text model is given, for the sake of its new rows; their logits are not compared."""
SEED = 0


class DocumentDifference(NamedTuple):
    """One packed document, here and alone in transformers."""

    row: int
    document: int
    tokens: int
    largest: float
    """Largest absolute logit of transformers."""
    difference: float
    """Largest absolute difference of a logit."""

    @property
    def ok(self) -> bool:
        """Whether the two agree; a difference that is no number does not."""
        return self.difference <= LIMIT


def check_llama(folder: LlamaFolder, layout: Layout) -> list[DocumentDifference]:
    """Compares `folder` in `layout`, on as many processes of this machine, with transformers; holds the model twice in fp32."""
    vocabulary = llama_vocabulary(folder)
    known = vocabulary.size if folder.vocabulary else folder.rows
    batch = random_documents(vocabulary, known, min(SEQ_LEN, folder.config.max_position_embeddings))
    ours = logits_in_layout(folder.path, layout, vocabulary, batch)
    return _compare(folder.path, ours[..., :known], batch)


def llama_vocabulary(folder: LlamaFolder) -> Vocabulary:
    """The folder's own vocabulary, or for a text model one with some codes."""
    return folder.vocabulary or Vocabulary(folder.rows, STAND_IN_CODES)


def random_documents(vocabulary: Vocabulary, known_ids: int, seq_len: int) -> MicroBatch:
    """`ROWS` rows of documents of random ids below `known_ids`, of random lengths, and some padding."""
    random = np.random.default_rng(SEED)
    rows = []
    for _ in range(ROWS):
        documents, left = [], seq_len
        while (length := int(random.integers(SHORTEST, min(LONGEST, seq_len // 2) + 1))) < left:
            documents.append(random.integers(known_ids, size=length))
            left -= length
        rows.append(documents)
    return lay_out(rows, vocabulary=vocabulary, eos_id=0, seq_len=seq_len, weight=1.0)


def logits_in_layout(folder: Path, layout: Layout, vocabulary: Vocabulary, batch: MicroBatch) -> Tensor:
    """The logits [row, position, id] of `batch`, by new processes that hold `folder` in `layout`.

    Raises `UserError` when there are fewer GPUs than processes, or when a process fails: with what the first to fail said last.
    """
    devices = torch.cuda.device_count() if torch.cuda.is_available() else layout.world_size
    check(
        devices >= layout.world_size,
        f"tensor {layout.tensor_size} x pipeline {layout.pipe_size} takes {layout.world_size} GPUs, one for each process, but there are"
        f" {devices}; ask for fewer processes, or set CUDA_VISIBLE_DEVICES to nothing to compare on CPUs.",
    )
    with tempfile.TemporaryDirectory() as scratch:
        arguments = (layout, folder, vocabulary, (batch.tokens, batch.position_ids, batch.document_ids), free_port(), Path(scratch))
        try:
            multiprocessing.start_processes(_run_rank, arguments, layout.world_size, start_method="spawn")
        except multiprocessing.ProcessExitedException as error:
            raise UserError(
                _first_said(Path(scratch)) or f"The comparison failed: {error}; a process that is killed often lacked memory."
            ) from None
        logits: Tensor = torch.load(Path(scratch) / "logits.pt", weights_only=True)
        return logits.transpose(0, 1)


def _first_said(scratch: Path) -> str | None:
    """What the first process that failed wrote, or None if it was killed; others fail for want of it. A mistake goes before a crash."""
    said = sorted(scratch.glob("failed-*"), key=lambda path: path.stat().st_mtime_ns)
    mistakes = sorted(scratch.glob("refused-*"))
    return next((path.read_text() for path in (*mistakes, *said)), None)


def _run_rank(
    rank: int,
    layout: Layout,
    folder: Path,
    vocabulary: Vocabulary,
    inputs: tuple[Tensor, Tensor, Tensor],
    port: int,
    scratch: Path,
) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": layout.world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        start_model_parallel(layout, max(1, (os.cpu_count() or 1) // layout.world_size))
        logits = _forward(rank, layout, folder, vocabulary, inputs)
        if logits is not None and layout.coordinates(rank).tensor == 0:
            torch.save(logits.cpu(), scratch / "logits.pt")
        dist.barrier()
    except UserError as error:
        (scratch / f"refused-{rank}").write_text(str(error))
        raise SystemExit(1) from None
    except Exception as error:  # the parent tells one sentence, whatever it was
        last_line = traceback.format_exception_only(error)[-1].strip().splitlines()[-1]
        (scratch / f"failed-{rank}").write_text(f"Rank {rank} of the comparison failed: {last_line}")
        raise SystemExit(1) from None
    dist.destroy_process_group()


@torch.no_grad()
def _forward(
    rank: int, layout: Layout, folder: Path, vocabulary: Vocabulary, inputs: tuple[Tensor, Tensor, Tensor]
) -> Tensor | None:
    """The logits [position, row, id] on ranks of the last stage, None on the others."""
    from lavit_dist.engine.llama_engine import build_module, run_stage  # imports megatron-core

    opened = LlamaFolder(folder)
    source = LlamaSource(opened, opened.config, vocabulary)
    tokens, position_ids, document_ids = (tensor.to(device()) for tensor in inputs)
    module, head = build_module(opened.config, layout, vocabulary, source, seq_len=tokens.shape[1])
    module.to(device())
    place = layout.coordinates(rank)
    first: Tensor = tokens
    if place.pipe > 0:
        first = torch.empty(*tokens.t().shape, opened.config.hidden_size, device=device())
        dist.recv(first, layout.rank(place._replace(pipe=place.pipe - 1)))
    result = run_stage(module, (first, position_ids, document_ids))
    if head is not None:
        logits: Tensor = head.projection.logits(result)
        return logits
    dist.send(result[0], layout.rank(place._replace(pipe=place.pipe + 1)))
    return None


@torch.no_grad()
def _compare(folder: Path, ours: Tensor, batch: MicroBatch) -> list[DocumentDifference]:
    from transformers import LlamaForCausalLM
    from transformers.utils import logging as of_transformers

    of_transformers.disable_progress_bar()
    theirs = LlamaForCausalLM.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32).eval()
    differences = []
    for row, ids in enumerate(batch.document_ids):
        for document in ids.unique().tolist():
            if document == PADDING_DOCUMENT:
                continue
            where = ids == document
            alone = theirs(batch.tokens[row][where][None]).logits[0]
            difference = (ours[row][where] - alone).abs().max().item()
            differences.append(DocumentDifference(row, document, int(where.sum()), alone.abs().max().item(), difference))
    return differences
