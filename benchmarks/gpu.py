"""The language model on one GPU: speed, memory, attention and precision, a section at a time, each a Markdown table.

    python benchmarks/gpu.py --section {attention,curve,memory,speed} [--dry]

`--dry` takes tiny sizes, for a CPU: it shows that everything runs, and its figures mean nothing. `gpu_suite.sh` runs all sections.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lavit_rows import LAVIT, LavitBatches
from pretrain_sides import SIDES
from torch import Tensor

from lavit_dist.config.model import LlamaConfig
from lavit_dist.config.pretrain import ParallelConfig, PretrainConfig
from lavit_dist.config.training import OptimizerConfig
from lavit_dist.engine.throughput import device_name, peak_flops, peak_memory_gib
from lavit_dist.models import packed_attention
from lavit_dist.models.llama import block_parameters, training_flops
from lavit_dist.models.packed_attention import PackedDocuments
from lavit_dist.parallel.communication_cost import Stage, StepSizes
from lavit_dist.parallel.distributed import device
from lavit_dist.parallel.scaling_model import memory_bytes
from lavit_dist.parallel.topology import Layout, start_model_parallel

SEVEN_B = LlamaConfig(max_position_embeddings=4096)
TINY = LlamaConfig(
    hidden_size=64, num_layers=2, num_attention_heads=4, num_key_value_heads=4, ffn_hidden_size=128, max_position_embeddings=512
)
CURVE = LlamaConfig(
    hidden_size=512, num_layers=4, num_attention_heads=8, num_key_value_heads=8, ffn_hidden_size=1376, max_position_embeddings=2048
)
LAYERS = 4
"""Decoder blocks of 7B's width in the section on speed: with the whole vocabulary, 1.2 G weights, 22 GB with their optimizer state."""
MICRO_BATCH_TOKENS = 8192
MICRO_BATCHES = 4
WARMUP_STEPS, TIMED_STEPS = 2, 3
ATTENTION_OPERATORS = re.compile(r"attn|attention", re.IGNORECASE)
REPLY = "measured: "
FAILED, UNEQUAL = "failed:", "NO"
"""In a row of a table, they make its section end with exit code 1."""


def pretrain_config(model: LlamaConfig, precision: str, seq_len: int, micro_batch_size: int, steps: int) -> PretrainConfig:
    return PretrainConfig(
        run_dir="",
        ids="",
        text_tokenizer="",
        model=model,
        parallel=ParallelConfig(zero_stage=1),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=0, schedule="constant"),
        total_steps=steps,
        global_batch_size=micro_batch_size * MICRO_BATCHES,
        micro_batch_size=micro_batch_size,
        seq_len=seq_len,
        precision=precision,
    )


def attention(dry: bool) -> Iterator[str]:
    """Packed attention as it runs here, and by buckets of documents, against SDPA in fp32 with a mask over whole rows."""
    rows, seq_len, heads, channels = (1, 256, 2, 16) if dry else (2, 2048, 32, 128)
    batch = LavitBatches(rows, seq_len).micro_batches(0, 0, 1, rows)[0]
    ids = batch.document_ids.to(device())
    documents = PackedDocuments.of(ids)
    generator = torch.Generator(device()).manual_seed(0)
    inputs = [torch.randn(seq_len, rows, heads, channels, device=device(), generator=generator).bfloat16() for _ in range(3)]
    mask = (ids[:, None, :, None] == ids[:, None, None]) & torch.ones(seq_len, seq_len, dtype=torch.bool, device=device()).tril()

    def whole_rows(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (of.permute(1, 2, 0, 3) for of in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).permute(2, 0, 1, 3).flatten(2)

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[list[Tensor], float]:
        seconds = []
        for _ in range(5):
            leaves = [of.to(dtype, copy=True).requires_grad_() for of in inputs]
            start = _now()
            out = function(*leaves)
            out.float().square().sum().backward()
            seconds.append(_now() - start)
        return [out.detach().float(), *(leaf.grad.float() for leaf in leaves if leaf.grad is not None)], statistics.median(seconds)

    exact, _ = run(whole_rows, torch.float32)
    yield f"## Attention: {rows} rows of {seq_len}, {heads} heads of {channels}, bf16\n"
    yield "| attention | ms, forward and backward | error of output | error of gradients | equal |"
    yield "| --- | --- | --- | --- | --- |"
    sides: dict[str, Callable[..., Tensor]] = {
        "SDPA, mask over whole rows": whole_rows,
        "SDPA, buckets of documents": lambda q, k, v: packed_attention._bucketed(q, k, v, documents),
        "packed attention as chosen here": lambda q, k, v: packed_attention.packed_attention(q, k, v, documents),
    }
    for name, function in sides.items():
        found, seconds = run(function, torch.bfloat16)
        errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact, strict=True)]
        equal = "yes" if max(errors) < 2e-2 else UNEQUAL
        yield f"| {name} | {1e3 * seconds:.2f} | {errors[0]:.1e} | {max(errors[1:]):.1e} | {equal} |"
    kernel = packed_attention.has_variable_length_kernel(inputs[0])
    yield f"\nChosen here: {'torch.nn.attention.varlen' if kernel else 'buckets'}. Errors are shares of the largest value in fp32.\n"


def curve(dry: bool) -> Iterator[str]:
    """The loss of a small model, again and again on one batch, in bf16 beside fp32."""
    steps, model, seq_len = (4, TINY, 256) if dry else (40, CURVE, 2048)
    _one_process()
    from lavit_dist.engine.pretraining import Pretraining

    losses = {}
    for precision in ("fp32", "bf16"):
        config = pretrain_config(model, precision, seq_len, 1, steps)
        training = Pretraining(config, Layout(1, 1, 1), LavitBatches(config.global_batch_size, seq_len))
        losses[precision] = [training.train_step(step)["loss"] for step in range(steps)]
    apart = [abs(b - a) / a for a, b in zip(losses["fp32"], losses["bf16"], strict=True)]
    yield f"## Loss in bf16 beside fp32: width {model.hidden_size}, {model.num_layers} layers\n"
    yield "| step | fp32 | bf16 | apart |\n| --- | --- | --- | --- |"
    for step in range(0, steps, max(1, steps // 8)):
        yield f"| {step} | {losses['fp32'][step]:.4f} | {losses['bf16'][step]:.4f} | {apart[step]:.1e} |"
    yield f"\nFarthest apart: {max(apart):.1e} of the loss.\n"


def memory(dry: bool) -> Iterator[str]:
    """What a full model takes: estimates, by DeepSpeed's formulas and by ours."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2

    model = TINY if dry else SEVEN_B
    table = LAVIT.size * model.hidden_size
    weights = 2 * table + model.num_layers * block_parameters(model)
    yield f"## Memory of {weights / 1e9:.2f} G weights in bf16, estimated\n"
    yield "DeepSpeed's formulas count model states; ours (`scaling_model.memory_bytes`) also activations of one micro-batch"
    yield f"of {MICRO_BATCH_TOKENS:,} tokens without recomputation. Measured peaks are in the section on speed.\n"
    yield "| GPUs | ZeRO | offload | DeepSpeed, GB per GPU | DeepSpeed, GB of host | ours, GB per GPU |"
    yield "| --- | --- | --- | --- | --- | --- |"
    whole = [Stage(model.num_layers, is_first=True, is_last=True)]
    for gpus in (1, 8):
        for stage in (1, 2, 3):
            sizes = StepSizes(model, LAVIT.size, MICRO_BATCH_TOKENS, 1, 2, stage)
            ours = memory_bytes(sizes, Layout(1, 1, gpus), whole)
            for offload in (False, True):
                if stage == 3:
                    host, of_gpu, _ = zero3(weights, table, gpus, cpu_offload=offload, cpu_offload_params=offload)
                elif stage == 2:
                    host, of_gpu = zero2(weights, gpus, cpu_offload=offload)
                else:
                    continue
                cells = [gpus, stage, "optimizer" if offload else "none", f"{of_gpu / 1e9:.1f}", f"{host / 1e9:.0f}"]
                yield f"| {' | '.join(map(str, cells))} | {'-' if offload else f'{ours / 1e9:.1f}'} |"
            if stage == 1:
                yield f"| {gpus} | 1 | none | - | - | {ours / 1e9:.1f} |"
    yield ""


def speed(dry: bool) -> Iterator[str]:
    """A training step at 7B's width, ours and transformers', each in a process of its own."""
    model, lengths = speed_model(dry)
    yield f"## Speed: width {model.hidden_size}, {model.num_layers} layers, vocabulary {LAVIT.size:,}, bf16, {device_name() or 'CPU'}\n"
    yield "MFU of 989 TFLOP/s: 6 operations per weight and token, attention within documents; padding does no useful work.\n"
    yield "| row | side | useful tokens/s | MFU | step s | attention | loss | optimizer | memory GiB | loss of the last step |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for seq_len in lengths:
        for side in ("ours", "HF, packed rows", "HF, padded batches"):
            if side == "HF, padded batches" and seq_len != lengths[0]:
                continue  # it doesn't know rows
            command = [sys.executable, "-W", "ignore", __file__, "--section", "side", "--side", side, "--seq-len", str(seq_len)]
            result = subprocess.run([*command, *(["--dry"] if dry else [])], capture_output=True, text=True, check=False)
            reply = next((line for line in result.stdout.splitlines() if line.startswith(REPLY)), None)
            if reply is None:
                yield f"| {seq_len} | {side} | {FAILED} {' '.join(result.stderr.split())[-200:]} | | | | | | | |"
                continue
            of = json.loads(reply.removeprefix(REPLY))
            shares = " | ".join(
                f"{of[name]:.1%}" if of.get(name) is not None else "-" for name in ("attention", "loss", "optimizer")
            )
            mfu = f"{of['mfu']:.1%}" if of["mfu"] is not None else "-"
            yield (
                f"| {seq_len} | {side} | {of['tokens_per_second']:,.0f} | {mfu} | {of['seconds']:.3f} | {shares} |"
                f" {of['memory_gib']:.1f} | {of['last_loss']:.4f} |"
            )
    yield ""


def speed_model(dry: bool) -> tuple[LlamaConfig, tuple[int, ...]]:
    """The model of the section on speed, and its row lengths."""
    if dry:
        return TINY, (256, 512)
    return LlamaConfig(num_layers=LAYERS, max_position_embeddings=4096), (2048, 4096)


def measure_side(side: str, seq_len: int, dry: bool) -> None:
    """The process of one side: prints its figures."""
    model, _ = speed_model(dry)
    micro_batch = 1 if dry else MICRO_BATCH_TOKENS // seq_len
    config = pretrain_config(model, "bf16", seq_len, micro_batch, WARMUP_STEPS + TIMED_STEPS + 1)
    batches = LavitBatches(config.global_batch_size, seq_len)
    step = SIDES[side](config, batches)
    for _ in range(WARMUP_STEPS):
        step()
    seconds = []
    for _ in range(TIMED_STEPS):
        start = _now()
        loss = step()
        seconds.append(_now() - start)
    attended = sum(len(document) * (len(document) + 1) / 2 for document in batches.documents)
    flops, peak = training_flops(model, LAVIT.size, batches.tokens, attended), peak_flops(device_name())
    figures: dict[str, Any] = {
        "seconds": statistics.median(seconds),
        "tokens_per_second": batches.tokens / statistics.median(seconds),
        "mfu": flops / statistics.median(seconds) / peak if peak else None,
        "memory_gib": peak_memory_gib(),
        "last_loss": loss,
    }
    if side == "ours":
        figures |= shares(step)
    print(REPLY + json.dumps(figures), flush=True)


def shares(step: Callable[[], float]) -> dict[str, float]:
    """Parts of a step's computation, by the profiler: attention's operators; the fused loss, whose backward pass is empty; the optimizer."""
    from lavit_dist.parallel.linear_cross_entropy import LinearCrossEntropy

    plain_loss = LinearCrossEntropy.forward  # wrapped for one step, so that the profiler tells the loss apart

    def loss(*args: Any) -> Any:
        with torch.profiler.record_function("part: loss"):
            return plain_loss(*args)

    LinearCrossEntropy.forward = staticmethod(loss)  # type: ignore[method-assign, assignment]
    on_gpu = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profile:
        step()
    LinearCrossEntropy.forward = plain_loss  # type: ignore[method-assign]
    operators = [of for of in profile.key_averages() if of.device_type == torch.autograd.DeviceType.CPU]
    own = {of.key: of.self_device_time_total if on_gpu else of.self_cpu_time_total for of in operators}
    within = {of.key: of.device_time_total if on_gpu else of.cpu_time_total for of in operators}
    total = sum(own.values())
    return {
        "attention": sum(value for key, value in own.items() if ATTENTION_OPERATORS.search(key)) / total,
        "loss": within.get("part: loss", 0.0) / total,
        "optimizer": sum(value for key, value in within.items() if key.startswith("Optimizer.step")) / total,
    }


SECTIONS = {"attention": attention, "curve": curve, "memory": memory, "speed": speed}


def _one_process() -> None:
    start_model_parallel(Layout(1, 1, 1))


def _now() -> float:
    """Seconds, after all that was asked of the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", choices=[*SECTIONS, "side"], required=True)
    parser.add_argument("--dry", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--output", type=Path, help="append the table there, too")
    arguments = parser.parse_args()
    if arguments.section == "side":
        measure_side(arguments.side, arguments.seq_len, arguments.dry)
        return
    sound = True
    for line in SECTIONS[arguments.section](arguments.dry):
        sound = sound and not any(bad in line for bad in (FAILED, f"| {UNEQUAL} |"))
        print(line, flush=True)
        if arguments.output:
            with arguments.output.open("a") as file:
                file.write(line + "\n")
    if not sound:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
