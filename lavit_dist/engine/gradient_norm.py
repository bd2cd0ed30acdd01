"""ZeRO's gradient norm where pipeline stages have optimizer groups of their own.

DeepSpeed sums each group's norm over the model-parallel ranks. Stages that differ in their number of groups, as those with an embedding
and those without do when its learning rate is another, would wait for one another for ever.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor


def sum_norm_once(engine: Any) -> None:
    """Makes an engine under ZeRO 1 or 2 add up the norm of all groups in one collective; leaves other engines alone."""
    optimizer = engine.optimizer
    if not isinstance(optimizer, DeepSpeedZeroOptimizer):
        return
    own_norm, over_stages = optimizer.scaled_global_norm, optimizer._model_parallel_all_reduce

    def norm(norm_type: float = 2) -> Tensor:
        optimizer._model_parallel_all_reduce = lambda **_: None
        square = own_norm(norm_type).square()  # infinite where a group's gradients are not finite
        optimizer._model_parallel_all_reduce = over_stages
        over_stages(tensor=square, op=dist.ReduceOp.SUM)
        return square.sqrt()

    optimizer.scaled_global_norm = norm
