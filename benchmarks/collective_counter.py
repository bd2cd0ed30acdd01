"""Counts what every collective and message of this process sends, below all libraries: as torch dispatches it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lavit_dist.parallel.topology import Layout

OUTPUTS_SHARE = ("allgather_", "_allgather_base_", "allgather_into_tensor_coalesced_")
INPUTS_SHARE = ("reduce_scatter_", "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_")
ROOTED = ("reduce_", "broadcast_")
SILENT = ("recv_", "recv_any_source_", "barrier", "monitored_barrier_")


class CollectiveCounter(TorchDispatchMode):
    """While entered: bytes that this rank sends by (axis, operation), as rings send them.

    Of n ranks and B bytes an all-reduce sends 2 (n - 1) / n B from each; gathering to, or scattering from, B bytes in all
    (n - 1) / n B; a reduction to one rank or a broadcast as much on the mean over ranks; a message B. An axis is tensor, data or
    pipe, or "several" for groups across axes.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.sent: Counter[tuple[str, str]] = Counter()
        self.axes = {tuple(layout.peers(dist.get_rank(), axis)): axis for axis in ("tensor", "data", "pipe")}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.namespace == "c10d":
            self._count(operation.__name__.split(".")[0], args)
        return operation(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name in SILENT:
            return
        if name == "send":
            self.sent["pipe", name] += _bytes(args[0])
            return
        group = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
        ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))
        if len(ranks) == 1:
            return
        once = (len(ranks) - 1) / len(ranks)
        if name == "allreduce_":
            sent = 2 * once * _bytes(args[0])
        elif name in (*OUTPUTS_SHARE, *ROOTED):
            sent = once * _bytes(args[0])
        elif name in INPUTS_SHARE:
            sent = once * _bytes(args[1])
        else:
            raise AssertionError(f"nobody said what c10d::{name} sends")
        self.sent[self.axes.get(ranks, "several"), name] += sent


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tree_leaves(tensors) if isinstance(tensor, torch.Tensor))
