"""LLaMA in a DeepSpeed engine: `PipelineModule` when there are pipeline stages, the plain engine otherwise; same layers, same loss."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any, cast

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn

from lavit_dist.config.model import LlamaConfig
from lavit_dist.config.pretrain import ActivationCheckpointingConfig, ParallelConfig, PretrainConfig
from lavit_dist.engine.adamw import apex_adamw, deepspeed_optimizer
from lavit_dist.engine.gradient_norm import correct_gradient_norm
from lavit_dist.engine.gradient_reduction import reduce_to_owners
from lavit_dist.engine.gradient_sums import sum_in_place
from lavit_dist.engine.llama_parameters import freeze, llama_groups
from lavit_dist.engine.schedule import scheduler_factory
from lavit_dist.errors import check
from lavit_dist.models.vocabulary import Vocabulary
from lavit_dist.parallel.distributed import rank
from lavit_dist.parallel.megatron_llama import KEEP_ACTIVATIONS, Head, Weights, llama_layers
from lavit_dist.parallel.stages import describe, layer_costs, partition
from lavit_dist.parallel.topology import Layout, ModelParallelUnit, deepspeed_topology
from lavit_dist.parallel.vocab_loss import LossReport, Targets

logger = logging.getLogger(__name__)


class LlamaPipeline(PipelineModule):
    """A pipeline whose stages hold the layers between `bounds`."""

    def __init__(self, bounds: list[int], **arguments: Any) -> None:
        self._bounds = bounds
        super().__init__(loss_fn=self._loss, **arguments)

    def _loss(self, hidden: Tensor, targets: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return cast("Tensor", cast("Head", self.forward_funcs[-1]).projection(hidden, Targets(*targets)))

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self._bounds
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])


class PlainLlama(nn.Sequential):
    """All layers in one module, under the names that a pipeline gives them."""

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor], targets: Targets) -> Tensor:  # type: ignore[override] # a Sequential's takes one input
        return cast("Tensor", cast("Head", self[-1]).projection(super().forward(inputs), targets))


def build_engine(config: PretrainConfig, layout: Layout, vocabulary: Vocabulary, weights: Weights) -> tuple[Any, LossReport]:
    """The engine, which starts from `weights`, and what its losses add up to, on every rank of `layout`, whose megatron-core groups
    exist. Collective.

    Raises `UserError` where something is to be compiled and there is no compiler.
    """
    _check_compiler(config.compile)
    micro_batches = config.global_batch_size // (config.micro_batch_size * layout.data_size)
    settings = _deepspeed_config(config, micro_batches)
    report = LossReport()
    module, _ = build_module(
        config.model,
        layout,
        vocabulary,
        weights,
        seq_len=config.seq_len,
        recompute=config.activation_checkpointing,
        layer_built=share_out(config.precision, settings) if config.parallel.zero_stage == 3 else None,
        attention=config.attention,
        sequence_parallel=config.parallel.sequence_parallel,
        gather_twice=config.parallel.gather_twice,
        compiled=config.compile,
        averaged_over=micro_batches * layout.data_size,
        z_loss=config.z_loss,
        report=report,
    )
    freeze(module, config.model, config.parameters, layout)
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its settings
        engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=llama_groups(module, config.optimizer, config.parameters),
            optimizer=apex_adamw(
                config.optimizer, zero_stage=config.parallel.zero_stage, offloaded=config.parallel.offload_optimizer
            ),
            lr_scheduler=scheduler_factory(config.optimizer, config.total_steps),
            mpu=None if layout.pipe_size > 1 else ModelParallelUnit(),  # a PipelineModule brings its own
            config=settings,
        )
    reduce_to_owners(engine)
    sum_in_place(engine)
    correct_gradient_norm(engine)
    return engine, report


def build_module(
    model: LlamaConfig,
    layout: Layout,
    vocabulary: Vocabulary,
    weights: Weights,
    *,
    seq_len: int,
    recompute: ActivationCheckpointingConfig = KEEP_ACTIVATIONS,
    layer_built: Callable[[nn.Module], nn.Module] | None = None,
    **options: Any,
) -> tuple[nn.Module, Head | None]:
    """This rank's layers, a stage of a pipeline or all of them, and the head if it is among them; `options` as in `llama_layers`.

    Without pipeline stages `layer_built` has each layer before the next one is built.
    """
    layers = llama_layers(model, vocabulary, weights, recompute=recompute, **options)
    if layout.pipe_size == 1:
        built = (layer.build() for layer in layers)
        plain = PlainLlama(*(map(layer_built, built) if layer_built else built))
        return plain, cast("Head", plain[-1])
    costs = layer_costs(model, vocabulary.size, seq_len, recompute)
    bounds = partition(costs, layout.pipe_size)
    if rank() == 0:
        logger.info("%s", describe(bounds, costs))
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its topology and partition
        pipeline = LlamaPipeline(bounds, layers=layers, topology=deepspeed_topology(layout))
    last = pipeline.forward_funcs[-1]
    return pipeline, last if isinstance(last, Head) else None


def share_out(precision: str, settings: Mapping[str, Any]) -> Callable[[nn.Module], nn.Module]:
    """A function that leaves a rank its part of a layer under ZeRO-3, so that none ever holds more than one layer whole.

    `settings` are DeepSpeed's. Collective over data-parallel ranks, whose first one's weights count.
    """
    unit = ModelParallelUnit()

    def leave_a_part(layer: nn.Module) -> nn.Module:
        if precision == "bf16":  # DeepSpeed takes weights that are cut for being in their precision
            layer.bfloat16()
        deepspeed.zero.Init(
            module=layer, data_parallel_group=unit.get_data_parallel_group(), config_dict_or_path=dict(settings), mpu=unit
        )
        return layer

    return leave_a_part


def _check_compiler(compile_blocks: bool) -> None:
    """torch compiles for CPUs through C++, and for GPUs through Triton and C; on those also megatron-core's SwiGLU, always."""
    gpu = torch.cuda.is_available()
    variable, usual = ("CC", ["gcc", "clang"]) if gpu else ("CXX", ["g++", "clang++"])
    installed = any(map(shutil.which, [os.environ.get(variable, usual[0]), *usual]))
    check(
        installed or not (gpu or compile_blocks),
        f"No compiler is installed ({' or '.join(usual)}), but {'the fused SwiGLU of GPUs' if gpu else 'compile: true'} needs one; install"
        f" it, or name yours in {variable}.",
    )


def run_stage(module: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> Any:
    """What the layers of `module`, from `build_module`, make of the micro-batch, or of what the stage before made of it."""
    return nn.Sequential.forward(module, inputs) if isinstance(module, PlainLlama) else module(inputs)


def _deepspeed_config(config: PretrainConfig, micro_batches: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "optimizer": deepspeed_optimizer(
            config.optimizer, zero_stage=config.parallel.zero_stage, offloaded=config.parallel.offload_optimizer
        ),
        # Without ZeRO the norm is measured where it is clipped by: always, so that one that isn't finite is seen.
        "gradient_clipping": config.optimizer.gradient_clipping or (0.0 if config.parallel.zero_stage else math.inf),
        "zero_optimization": _zero(config.parallel),
        # None would round to bf16 what data-parallel ranks add up
        "communication_data_type": "fp32",
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


def _zero(parallel: ParallelConfig) -> dict[str, Any]:
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    # by default whole buckets are all-reduced, which sends twice what reducing each part to its owner does
    settings: dict[str, Any] = {"stage": parallel.zero_stage, "use_multi_rank_bucket_allreduce": False}
    if parallel.offload_optimizer:
        settings["offload_optimizer"] = host
    if parallel.offload_parameters:
        settings["offload_param"] = host
    return settings
