"""LLaMA in a DeepSpeed engine: `PipelineModule` when there are pipeline stages, the plain engine otherwise; same layers, same loss."""

from __future__ import annotations

import contextlib
import io
import types
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.utils import partition_balanced
from torch import Tensor, nn

from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.engine.adamw import apex_adamw, deepspeed_optimizer
from lavit_dist.engine.schedule import parameter_groups, scheduler_factory
from lavit_dist.models.vocabulary import Vocabulary
from lavit_dist.parallel.megatron_llama import Head, layer_weights, llama_layers, random_weights
from lavit_dist.parallel.topology import Layout, ModelParallelUnit, deepspeed_topology
from lavit_dist.parallel.vocab_loss import LossReport, Targets


class LlamaPipeline(PipelineModule):
    """A pipeline whose stages hold about equal numbers of weights, counted without building the layers."""

    def __init__(self, weights: list[int], **arguments: Any) -> None:
        self._weights = weights
        super().__init__(loss_fn=self._loss, **arguments)

    def _loss(self, hidden: Tensor, targets: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return cast("Tensor", cast("Head", self.forward_funcs[-1]).projection(hidden, Targets(*targets)))

    def _partition_layers(self, method: str = "") -> None:
        self.parts = partition_balanced(weights=self._weights, num_parts=self.num_stages)
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])


class PlainLlama(nn.Sequential):
    """All layers in one module, under the names that a pipeline gives them."""

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor], targets: Targets) -> Tensor:  # type: ignore[override]
        return cast("Tensor", cast("Head", self[-1]).projection(super().forward(inputs), targets))


def build_engine(config: PretrainConfig, layout: Layout, vocabulary: Vocabulary) -> tuple[Any, LossReport]:
    """The engine and what its losses add up to, on every rank of `layout`, whose megatron-core groups exist. Collective."""
    micro_batches = config.global_batch_size // (config.micro_batch_size * layout.data_size)
    report = LossReport()
    layers = llama_layers(
        config.model,
        vocabulary,
        random_weights(config.model, config.seed),
        config.attention,
        averaged_over=micro_batches * layout.data_size,
        z_loss=config.z_loss,
        report=report,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its topology and partition
        if layout.pipe_size > 1:
            weights = layer_weights(config.model, vocabulary.size)
            module: nn.Module = LlamaPipeline(weights, layers=layers, topology=deepspeed_topology(layout))
            mpu = None  # a PipelineModule brings its own
        else:
            module, mpu = PlainLlama(*(layer.build() for layer in layers)), ModelParallelUnit()
        engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=parameter_groups(module.parameters(), config.optimizer),
            optimizer=apex_adamw(config.optimizer),
            lr_scheduler=scheduler_factory(config.optimizer, config.total_steps),
            mpu=mpu,
            config=_deepspeed_config(config, micro_batches),
        )
    engine.clip_fp32_gradients = types.MethodType(_clip_fp32_gradients, engine)
    return engine, report


def _deepspeed_config(config: PretrainConfig, micro_batches: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "optimizer": deepspeed_optimizer(config.optimizer),
        "gradient_clipping": config.optimizer.gradient_clipping,
        "zero_optimization": {"stage": config.parallel.zero_stage},
        # A gradient goes to its fp32 sum as soon as it is made. Otherwise DeepSpeed would clear that of the head's matrix, whose loss
        # is computed outside of what it takes for the last stage's output.
        "bf16": {"enabled": config.precision == "bf16", "immediate_grad_update": True},
        # None would accumulate the gradients of bf16 weights in bf16
        "data_types": {"grad_accum_dtype": "fp32"},
        # whole activations travel between stages: cutting them over tensor ranks costs a gather at each end
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


@torch.no_grad()
def _clip_fp32_gradients(engine: Any) -> None:
    """DeepSpeed's own, for fp32 without ZeRO, leaves the norms of later pipeline stages out of the gradient norm.

    Weights that tensor-parallel ranks share out count on each of them, the others on the first alone.
    """
    parameters = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
    first = engine.mpu.get_tensor_model_parallel_rank() == 0
    counted = [p.grad for p in parameters if first or getattr(p, "tensor_model_parallel", False)]
    square = torch.zeros((), device=engine.device)
    for grad in counted:
        square += grad.float().square().sum()
    dist.all_reduce(square, group=engine.mpu.get_model_parallel_group())
    engine._global_grad_norm = square.sqrt()
    scale = (engine.gradient_clipping() / (engine._global_grad_norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        parameter.grad.mul_(scale)
