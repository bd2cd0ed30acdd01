"""How the rows of [IMG], [/IMG] and the codes begin in a language model that was trained on text: among the text rows, not far off.

benchmarks/new_rows.md compares the methods.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lavit_dist.config.model import LlamaConfig
from lavit_dist.models.llama import initial_weight


class RowStatistics(NamedTuple):
    """Mean and standard deviation of a table's rows, each [width], fp32."""

    mean: Tensor
    std: Tensor


def row_statistics(parts: Iterable[Tensor]) -> RowStatistics:
    """Statistics of the rows of `parts`, each [row, width], which together are a table."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for part in parts:
        rows = part.double()
        count, total, squares = count + len(rows), total + rows.sum(0), squares + rows.square().sum(0)
    mean = total / count
    return RowStatistics(mean.float(), (squares / count - mean.square()).clamp(min=0).sqrt().float())


def mean_noise_rows(model: LlamaConfig, name: str, shape: tuple[int, int], text: RowStatistics, seed: int) -> Tensor:
    """Rows drawn as the text rows are spread, channel by channel: [row, width], fp32."""
    return text.mean + text.std * _standard_normal(model, name, shape, seed)


def projected_rows(model: LlamaConfig, name: str, shape: tuple[int, int], text: RowStatistics, codes: Tensor, seed: int) -> Tensor:
    """The rows of [IMG] and [/IMG] as in `mean_noise_rows`, then the codes [code, channel], turned into the width and as far as text
    rows are from the mean of those: codes that are alike have rows that are alike."""
    dim, width = codes.shape[1], shape[1]
    tall = _standard_normal(model, f"{name} projection", (max(dim, width), min(dim, width)), seed)
    turn = torch.linalg.qr(tall).Q
    spread = (codes - codes.mean(0)) @ (turn.t() if dim <= width else turn)
    distance, wanted = spread.square().sum(1).mean().sqrt(), text.std.square().sum().sqrt()
    marks = mean_noise_rows(model, name, (shape[0] - len(codes), width), text, seed)
    return torch.cat([marks, text.mean + spread * (wanted / distance)])


def _standard_normal(model: LlamaConfig, name: str, shape: tuple[int, int], seed: int) -> Tensor:
    return initial_weight(dataclasses.replace(model, init_std=1.0), name, shape, seed)
