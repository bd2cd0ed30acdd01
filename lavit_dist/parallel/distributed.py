"""Starting and naming the processes of a run: under the deepspeed launcher, torchrun, srun, or as one plain process."""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from lavit_dist.parallel.lean_imports import import_deepspeed
from lavit_dist.parallel.outside_faults import outside_faults_told

T = TypeVar("T")
LISTENED_PORTS = range(20000, 29000)
"""Where `free_port` looks: above Ray's, below torch's default, and outside what systems give to outgoing connections."""
PORT_TRIES = 100
JOIN_SECONDS = 7200.0


def rank() -> int:
    """The global rank; 0 before or without a process group started by a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device() -> torch.device:
    """This process's accelerator, or the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")


def init_distributed(num_threads: int | None = None, timeout_seconds: float = 1800.0) -> None:
    """Joins the process group (nccl on GPUs, gloo on CPUs) and sets this process's device and CPU threads.

    A process started without a launcher becomes a group of one on a free loopback port. Until `set_timeouts`, other processes are waited
    for as long as `timeout_seconds` says, but at least two hours, since rank 0 may have read all of the data before it joins.
    """
    if num_threads:
        torch.set_num_threads(num_threads)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # deepspeed reads it once, at import
    import_deepspeed()
    import deepspeed

    # On CPUs DeepSpeed would first compile its shared-memory kernels, which serve inference alone; a machine may have no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    atexit.register(_leave)
    with outside_faults_told("while processes joined", retry=False):
        deepspeed.init_distributed(
            dist_backend=backend, auto_mpi_discovery=False, timeout=timedelta(seconds=max(2 * timeout_seconds, JOIN_SECONDS))
        )


def _leave() -> None:
    """At the end of the process: gloo's threads, left to the interpreter, now and then end it by SIGABRT."""
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def set_timeouts(seconds: float) -> None:
    """Gives the collectives of every group, also of those that libraries made, a time-out of twice `seconds`.

    Twice, so that whoever watches a run for `seconds` has told what hangs before they fail.
    """
    if dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2 * seconds), group)


def matmul_precision(precision: str) -> torch.autocast:
    """The context in which a forward pass multiplies matrices in `bf16`, or leaves everything in `fp32`."""
    return torch.autocast(device().type, torch.bfloat16, enabled=precision == "bf16")


def barrier() -> None:
    """Waits for every process of the run."""
    if dist.is_initialized():
        dist.barrier()


def mean_over_ranks(metrics: Mapping[str, float]) -> dict[str, float]:
    """Each figure averaged over all ranks, in one collective; every rank must report the same names."""
    if world_size() == 1:
        return dict(metrics)
    values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=device())
    dist.all_reduce(values)
    return dict(zip(metrics, (values / world_size()).tolist(), strict=True))


def mean_with_gradient(local: torch.Tensor) -> torch.Tensor:
    """The mean over all ranks of a tensor, through which gradients flow back to each rank's own.

    What is computed of it and then averaged over the ranks has the gradient of the same function of the whole.
    """
    if world_size() == 1:
        return local
    mean = local.detach().clone()
    dist.all_reduce(mean)
    return local + (mean / world_size() - local.detach())


def gather_with_gradient(local: torch.Tensor) -> torch.Tensor:
    """The rows of every rank [rank x batch, ...] in rank order, through which gradients flow back to each rank's own."""
    if world_size() == 1:
        return local
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(local))


def gather(local: torch.Tensor) -> torch.Tensor:
    """The rows of every rank [rank x batch, ...] in rank order, without gradients."""
    if world_size() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local)
    return torch.cat(parts)


def gather_rows(local: torch.Tensor) -> torch.Tensor:
    """The rows [any, ...] of every rank in rank order, however many each has, without gradients."""
    if world_size() == 1:
        return local
    counts = gather(torch.tensor([len(local)], device=local.device)).tolist()
    padded = torch.cat([local, local.new_zeros(max(counts) - len(local), *local.shape[1:])])
    parts = gather(padded).split(len(padded))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gather_objects(local: T) -> list[T]:
    """Every rank's small plain value, in rank order."""
    if world_size() == 1:
        return [local]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, local)
    return values


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch alike on every rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def free_port() -> int:
    """A TCP port on the loopback interface that was free a moment ago, below those that the system gives to outgoing connections.

    Of those, another run's connections could take it before it is listened on. Raises `OSError` if none of a hundred is free.
    """
    for port in random.SystemRandom().sample(LISTENED_PORTS, PORT_TRIES):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"None of {PORT_TRIES} ports from {LISTENED_PORTS.start} to {LISTENED_PORTS.stop - 1} is free.")
