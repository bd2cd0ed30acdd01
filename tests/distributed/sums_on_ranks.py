"""Program of the test of gradient sums: two layers train, of which the second is left out of some steps; OUT/RANK.json tells of each step.

Each has two micro-batches, and each one's gradient is GRADIENT for every weight of a layer that takes part.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from lavit_dist.engine.gradient_reduction import reduce_to_owners
from lavit_dist.engine.gradient_sums import sum_in_place
from lavit_dist.parallel.distributed import rank
from lavit_dist.parallel.topology import Layout, ModelParallelUnit, start_model_parallel

TAKE_PART = [(True, True), (True, False), (True, True), (False, True)]
"""Of each step, the layers."""
SIZES = 8, 24
GRADIENT = 1 + 2**-12
"""Is 1 in bf16."""


class Sum(torch.autograd.Function):
    """Of weights, with a gradient that is made in fp32."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor) -> Tensor:
        ctx.shape = weights.shape
        return weights.float().sum()

    @staticmethod
    def backward(ctx: Any, *of_sum: Tensor) -> Tensor:
        return of_sum[0] * torch.full(ctx.shape, GRADIENT)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ParameterList(torch.zeros(size) for size in SIZES)
        for layer in self.layers:
            layer.has_fp32_gradient = True

    def forward(self, take_part: tuple[bool, ...]) -> Tensor:
        return torch.stack([Sum.apply(layer) for layer, on in zip(self.layers, take_part, strict=True) if on]).sum()


def main(world_size: int, out: Path) -> None:
    start_model_parallel(Layout(1, 1, world_size), 1)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True, "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_clipping": 100.0,
    }
    model = Layers()
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), mpu=ModelParallelUnit(), config=settings
    )
    reduce_to_owners(engine)
    sum_in_place(engine)
    steps = []
    for take_part in TAKE_PART:
        for _ in range(2):
            engine.backward(engine(take_part))
            engine.step()
        told = {"sizes": [size for size, on in zip(SIZES, take_part, strict=True) if on], "take_part": take_part}
        steps.append(
            told | {"norm": float(engine.get_global_grad_norm()), "weights": [float(w.float().mean()) for w in model.layers]}
        )
    (out / f"{rank()}.json").write_text(json.dumps(steps))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
