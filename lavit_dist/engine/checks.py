"""Sanity mode: what ranks must have in common is compared, by digests, so that a fault is named at the step where it shows.

Compared are weights that tensor-parallel ranks share, all weights over data-parallel ranks, learning rates, the optimizer's step,
the gradient norm; each rank looks whether its fp32 masters round to its weights and whether Adam's averages are finite. Two
collectives of a digest per weight and one of a few numbers, and two readings of all weights: no weight travels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from lavit_dist.engine.held_weights import HeldWeight, held_weights, optimizer_steps
from lavit_dist.engine.llama_parameters import hugging_face_names
from lavit_dist.errors import UserError
from lavit_dist.parallel.distributed import device, rank
from lavit_dist.parallel.topology import Layout

REMEDY = "go back to a checkpoint before it (remove the later ones), and if it comes again, test the machines of these ranks"
LEARNING_RATES = "the learning rates"
SKIPPED = -1.0
"""In the place of the gradient norm, where the last step wasn't taken."""
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ROW = 1024
"""Words of 8 bytes that are summed at a time."""
COLUMN_FACTOR = 1_000_003
"""More than twice the rows of any weight, so that each position counts with a factor of its own."""


class RankChecks:
    """The checks of one engine. Every method is collective over all ranks, and raises the same `UserError` on each."""

    def __init__(self, engine: Any, layout: Layout) -> None:
        self.engine, self.layout = engine, layout
        self.groups = {
            "tensor": parallel_state.get_tensor_model_parallel_group(),
            "data": parallel_state.get_data_parallel_group(),
        }

    def check_groups(self) -> None:
        """That the groups over which the engine reduces are those of the layout."""
        problem = None
        engines = {"data": self.engine.seq_data_parallel_group}
        if self.layout.pipe_size > 1:
            grid = self.engine.grid
            engines |= {"tensor": grid.get_slice_parallel_group(), "pipe": grid.get_pipe_parallel_group()}
        else:
            engines |= {"tensor": self.engine.mpu.get_tensor_model_parallel_group()}
        for axis, group in engines.items():
            ours, theirs = self.layout.peers(rank(), axis), dist.get_process_group_ranks(group)
            if ours != theirs:
                problem = f"DeepSpeed's {axis}-parallel group of {self._who(rank())} is {theirs}, but the layout's is {ours}"
        self._raise_together(problem, {})

    def check_state(self, when: str) -> None:
        """That weights, optimizer state, learning rates and the last gradient norm are as they must be."""
        held = list(held_weights(self.engine))
        shared = {LEARNING_RATES: _digest(torch.tensor(self.engine.get_lr(), dtype=torch.float64, device=device()))}
        over = {"tensor": dict(shared), "data": dict(shared)}
        for weight in held:
            self._add_digests(weight, over)
        problems = [self._difference(axis, digests) for axis, digests in over.items()]
        problems += [self._problem_of(weight) for weight in held]
        steps = optimizer_steps(self.engine)
        if len(steps) > 1:
            problems.append(f"the optimizer of {self._who(rank())} holds several step counts, {sorted(steps)}")
        norm = float(self.engine.get_global_grad_norm() or 0.0)  # None before the first step
        if getattr(self.engine.optimizer, "overflow", False):
            norm = SKIPPED  # seen by the engine, which took no step; nan on one rank wouldn't equal nan on another
        if not math.isfinite(norm):
            problems.append(f"the gradient norm is {norm} on {self._who(rank())}")
        equal = {
            "the optimizer's step": max(steps, default=0),
            "the number of steps taken": self.engine.global_steps,
            "the gradient norm": norm,
        }
        problem = next((found for found in problems if found), None)
        self._raise_together(problem and f"{when}, {problem}", {f"{when}, {name}": value for name, value in equal.items()})

    @staticmethod
    def _add_digests(weight: HeldWeight, over: dict[str, dict[str, Tensor]]) -> None:
        whole = None if weight.whole is None else _digest(weight.whole)
        if whole is not None:
            over["data"][weight.name] = whole
        if not getattr(weight.parameter, "tensor_model_parallel", False):
            part = whole if whole is not None or weight.part is None else _digest(weight.part)
            if part is not None:
                over["tensor"][weight.name] = part

    def _difference(self, axis: str, digests: Mapping[str, Tensor]) -> str | None:
        """The first of `digests` on which the ranks along `axis` disagree, as a clause."""
        peers = self.layout.peers(rank(), axis)
        if len(peers) == 1:
            return None
        mine = torch.stack([digest.to(device()) for digest in digests.values()])  # offloaded weights are elsewhere
        every = mine.new_empty(len(peers) * len(mine))
        dist.all_gather_into_tensor(every, mine, group=self.groups[axis])
        differs = (every.view(len(peers), -1) != every[: len(mine)]).cpu()
        if not differs.any():
            return None
        which = int(differs.any(0).nonzero()[0])
        name = list(digests)[which]
        name = name if name == LEARNING_RATES else _named(name)
        other = peers[int(differs[:, which].nonzero()[0])]
        return (
            f"{name} on {self._who(other)} differs from that on {self._who(peers[0])}, but {axis}-parallel ranks must hold the same"
        )

    def _problem_of(self, weight: HeldWeight) -> str | None:
        name = _named(weight.name)
        if weight.part is not None and weight.master is not None:
            rounded = weight.master.to(weight.part.device, weight.part.dtype)
            if not torch.equal(rounded, weight.part):
                return f"the fp32 master of {name} on {self._who(rank())} doesn't round to the weight"
        for moment, values in weight.moments.items():
            if values.numel() and not torch.linalg.vector_norm(values, math.inf).isfinite():
                return f"the optimizer's {moment} of {name} on {self._who(rank())} isn't finite"
        return None

    def _raise_together(self, problem: str | None, equal: Mapping[str, float]) -> None:
        """Raises on all ranks what one of them found, or which of the numbers in `equal` isn't equal on all of them."""
        mine = torch.tensor([problem is not None, *equal.values()], dtype=torch.float64, device=device())
        every = mine.new_empty(self.layout.world_size * len(mine))
        dist.all_gather_into_tensor(every, mine)
        every = every.view(self.layout.world_size, -1).cpu()
        if every[:, 0].any():
            said = [problem]
            dist.broadcast_object_list(said, src=int(every[:, 0].nonzero()[0]), device=device())
            raise UserError(f"{said[0]}; {REMEDY}.")
        for name, values in zip(equal, every[:, 1:].T, strict=True):
            if (values != values[0]).any():
                other = int((values != values[0]).nonzero()[0])
                raise UserError(
                    f"{name} is {values[other]:.17g} on {self._who(other)}, but {values[0]:.17g} on {self._who(0)}, and must be the"
                    f" same on all ranks; {REMEDY}."
                )

    def _who(self, of: int) -> str:
        place = self.layout.coordinates(of)
        return f"rank {of} (pipe {place.pipe}, data {place.data}, tensor {place.tensor})"


def _named(name: str) -> str:
    """Hugging Face's names of what a parameter holds, and the engine's name of it."""
    return f"{', '.join(hugging_face_names(name))} ({name})"


def _digest(tensor: Tensor) -> Tensor:
    """A number, int64, that changes with any bit of `tensor`, and with the order of its numbers: a weighted sum, without a copy."""
    numbers = tensor.detach().contiguous().flatten()
    per_word = 8 // numbers.element_size()
    if numbers.storage_offset() % per_word:
        numbers = numbers.clone()  # it begins within a word of its memory
    words = numbers[: len(numbers) // per_word * per_word].view(torch.int64)
    rows = len(words) // ROW
    body, rest = words[: rows * ROW].view(rows, ROW), words[rows * ROW :]
    end = numbers[len(words) * per_word :].view(BITS[numbers.element_size()]).long()
    # A word's factor, 2 x row + COLUMN_FACTOR x (2 x column + 1), is odd, so that no change of one word is lost in 64 bits.
    by_row = 2 * torch.arange(rows + 1, device=words.device)
    by_column = COLUMN_FACTOR * (2 * torch.arange(ROW + per_word, device=words.device) + 1)
    tail = torch.cat([rest, end])
    sums = body.sum(1) * by_row[:rows], body.sum(0) * by_column[:ROW], tail * (by_row[rows] + by_column[: len(tail)])
    return torch.stack([part.sum() for part in sums]).sum()
