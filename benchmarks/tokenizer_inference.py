"""Images per second of the visual tokenizer against a straightforward implementation of the released computation.

    python benchmarks/tokenizer_inference.py [--width W --tower-layers N --merger-layers M ...] [--dtype fp32 bf16] [--compile]
        [--output benchmarks/tokenizer_inference.md]

Both sides have the same weights, images, selection noise and precision. They take turns in one process, each at the batch size that
suits it best; figures are medians over the rounds. Set OMP_NUM_THREADS to choose the threads; with one, processor time is
counted, which other work on the machine doesn't stretch. Weights are random, and the selector is calibrated to the keep ratio.
"""

import argparse
import copy
import datetime
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from released_tokenizer import STAGES, Clock, Released, Tokens
from torch import Tensor

from lavit_dist.config.model import (
    MLP_RATIO,
    CodebookConfig,
    MergerConfig,
    TokenizerDecoderConfig,
    VisionEncoderConfig,
    VisualTokenizerConfig,
)
from lavit_dist.models.frozen_linear import FrozenLinear
from lavit_dist.models.inference import freeze_for_inference
from lavit_dist.models.initialisation import initialise
from lavit_dist.models.selector import keyed_gumbel_noise
from lavit_dist.models.visual_tokenizer import VisualTokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Ours:
    """The library's inference, stage by stage."""

    def __init__(self, tokenizer: VisualTokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, pixels: Tensor, noise: Tensor, clock: Clock) -> Tokens:
        tokenizer = self.tokenizer
        with clock.stage("tower"):
            features = tokenizer.encode(pixels)
        with clock.stage("selector"):
            keep_mask = tokenizer.choose(features, noise)
        with clock.stage("merger"):
            merged = tokenizer.merger.merge_kept(features, keep_mask)
        with clock.stage("quantizer"):
            codes = tokenizer.codes_of(merged)
            vectors = tokenizer.quantizer.embedding(codes)
        return Tokens(features, keep_mask, codes, vectors)


Side = Callable[[Tensor, Tensor, Clock], Tokens]


def timed(side: Side, pixels: Tensor, noise: Tensor, batch: int) -> tuple[list[Tokens], dict[str, float]]:
    """What a side makes of all images, and the seconds that each stage took per image."""
    clock = Clock(pixels.device.type)
    tokens = [side(pixels[at : at + batch], noise[at : at + batch], clock) for at in range(0, len(pixels), batch)]
    return tokens, {stage: seconds / len(pixels) for stage, seconds in clock.seconds.items()}


def compare(ours: list[Tokens], theirs: list[Tokens]) -> str:
    """How far two sides agree."""
    one, other = (Tokens(*(torch.cat(part) for part in zip(*tokens, strict=True))) for tokens in (ours, theirs))
    features = ((one.features - other.features).abs().max() / other.features.abs().max()).item()
    masks = (one.keep_mask == other.keep_mask).float().mean().item()
    # Ids are compared where both keep the patch.
    both = one.keep_mask & other.keep_mask
    ids = [torch.full_like(both, -1, dtype=torch.int64).masked_scatter(of.keep_mask, of.codes)[both] for of in (one, other)]
    same = (ids[0] == ids[1]).float().mean().item()
    return (
        f"features differ by {features:.1e} of the largest, {masks:.2%} of the patches are chosen alike,"
        f" {same:.2%} of the ids are equal; {len(ids[0].unique()):,} different ids, keep ratio {one.keep_mask.float().mean():.3f}"
    )


def flops_per_image(config: VisualTokenizerConfig, kept: float) -> tuple[float, float]:
    """Floating point operations of one image's products and attention: of ours, and of the released form."""
    width, patches, encoder, merger = config.encoder.width, config.encoder.num_patches, config.encoder, config.merger
    positions = patches + 1
    tower = encoder.layers * (positions * (8 * width**2 + 4 * width * encoder.mlp_hidden) + 4 * positions**2 * width)
    tower += 2 * patches * 3 * encoder.patch_size**2 * width

    def merge(queries: float, keys: float, values: float) -> float:
        linear = queries * (12 * width**2 + 4 * width * merger.mlp_hidden) + 2 * (keys + values) * width**2
        return merger.layers * (linear + 2 * queries * width * (2 * queries + keys + values))

    return tower + merge(kept, patches, patches - kept), tower + merge(patches, patches, patches)


class Result(NamedTuple):
    """What one side took, round by round."""

    batch: int
    tokens: list[Tokens]
    rounds: list[dict[str, float]]
    """Seconds per image and stage."""

    @property
    def seconds(self) -> list[float]:
        """Seconds per image of each round."""
        return [sum(stages.values()) for stages in self.rounds]


def take_turns(sides: dict[str, Side], pixels: Tensor, noise: Tensor, batches: list[int], rounds: int) -> dict[str, Result]:
    """Finds each side's best batch size (the trial also warms up), then times the sides alternately."""
    results = {}
    for name, side in sides.items():
        trials = {batch: min(sum(timed(side, pixels, noise, batch)[1].values()) for _ in range(2)) for batch in batches}
        results[name] = Result(min(trials, key=lambda batch: trials[batch]), [], [])
    for _ in range(rounds):
        for name, side in sides.items():
            tokens, stages = timed(side, pixels, noise, results[name].batch)
            results[name].tokens[:] = tokens
            results[name].rounds.append(stages)
    return results


def product_rate(device: str, dtype: torch.dtype) -> float:
    """The roof: operations per second of a large product in `dtype`, the fastest of some."""
    rows, width, out = (8192, 8192, 8192) if device == "cuda" else (1024, 1024, 3072)
    layer = FrozenLinear(torch.randn(out, width, device=device), None, dtype)
    x = torch.randn(rows, width, device=device).to(dtype)
    clocks = [Clock(device) for _ in range(20)]
    for clock in clocks:
        with clock.stage("tower"):
            layer(x)
    return 2 * rows * width * out / min(clock.seconds["tower"] for clock in clocks)


def row(name: str, result: Result, reference: Result, flops: float, roof: float) -> str:
    seconds = result.seconds
    ratio = statistics.median(theirs / ours for theirs, ours in zip(reference.seconds, seconds, strict=True))
    stages = [f"{1000 * statistics.median(of[stage] for of in result.rounds):.1f}" for stage in STAGES]
    rate = flops / statistics.median(seconds)
    cells = [name, result.batch, f"{1 / statistics.median(seconds):.2f}", f"{1 / min(seconds):.2f}", f"{ratio:.2f}", *stages]
    return " | ".join(["", *map(str, cells), f"{rate / 1e12:.3f}", f"{rate / roof:.0%}", ""]).strip()


def tables(arguments: argparse.Namespace, tokenizer: VisualTokenizer, pixels: Tensor, noise: Tensor) -> Iterator[str]:
    """The report in Markdown."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    config = tokenizer.config
    yield "# Tokenizer inference\n"
    yield (
        f"`{' '.join(['python', *sys.argv])}`, {datetime.date.today():%-d %B %Y}, {machine(arguments.device)}, commit {commit}."
        f" Width {config.encoder.width}, {config.encoder.layers} tower and {config.merger.layers} merger layers, heads of"
        f" {config.encoder.head_width} channels, {config.encoder.num_patches} patches, {config.codebook.size:,} codes of"
        f" {config.codebook.dim}, keep ratio {arguments.keep_ratio:.2f}; {len(pixels)} images, medians of {arguments.rounds} rounds in"
        f" which the sides take turns.\n"
    )
    for name in arguments.dtype:
        sides: dict[str, Side] = {"released": Released(tokenizer, DTYPES[name])}
        if name == "fp32":
            sides["ours, not frozen"] = Ours(tokenizer)
        sides["ours"] = Ours(freeze_for_inference(copy.deepcopy(tokenizer), dtype=DTYPES[name]))
        if arguments.compile:
            compiled = freeze_for_inference(copy.deepcopy(tokenizer), dtype=DTYPES[name], compile_blocks=True)
            sides["ours, compiled"] = Ours(compiled)
        results = take_turns(sides, pixels, noise, arguments.batches, arguments.rounds)
        kept = torch.cat([tokens.keep_mask for tokens in results["ours"].tokens]).sum().item() / len(pixels)
        flops, roof = flops_per_image(config, kept), product_rate(arguments.device, DTYPES[name])
        yield f"## {name}\n"
        yield "| side | batch | images/s | best round | ratio | tower ms | selector ms | merger ms | quantizer ms | TFLOP/s | of the roof |"
        yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
        for side, result in results.items():
            yield row(side, result, results["released"], flops[side == "released"], roof)
        yield f"\nOurs against released: {compare(results['ours'].tokens, results['released'].tokens)}."
        yield f"Products and attention of one image: {flops[0] / 1e9:.1f} GFLOP in ours, {flops[1] / 1e9:.1f} in the released form.\n"
    yield "The roof is the rate of one large product in the same precision, measured in the same run.\n"
    yield unlike_images(tokenizer, pixels)
    yield "Full size (width 1408, 40 + 12 layers) in bf16: " + (
        "see above."
        if arguments.device == "cuda"
        else "not measured on GPU; `--device cuda --width 1408 --tower-layers 40 --merger-layers 12 --dtype bf16` does."
    )


def unlike_images(tokenizer: VisualTokenizer, pixels: Tensor) -> str:
    """Whether images that keep different numbers of patches cost more together than images that keep equally many."""
    merger = freeze_for_inference(copy.deepcopy(tokenizer)).merger
    features = tokenizer.encode(pixels[torch.arange(8) % len(pixels)])
    patches = features.shape[1]
    ranks = torch.rand(features.shape[:2], device=features.device).argsort(-1)
    alike, unlike = (
        ranks < torch.tensor(counts, device=features.device)[:, None] * patches // 24
        for counts in ([8] * 8, [2, 4, 5, 7, 9, 11, 12, 14])
    )
    seconds: list[list[float]] = [[], []]
    for _ in range(7):
        for mask, of in zip((alike, unlike), seconds, strict=True):
            clock = Clock(features.device.type)
            with clock.stage("merger"):
                merger.merge_kept(features, mask)
            of.append(clock.seconds["merger"])
    same, different = (statistics.median(of) for of in seconds)
    return (
        f"Batching by similar work: merging 8 images that keep from 1/12 to 7/12 of their patches takes {different / same:.2f} x the"
        f" time of 8 that keep 1/3 each ({int(unlike.sum())} and {int(alike.sum())} tokens). Packing makes grouping unnecessary.\n"
    )


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{torch.get_num_threads()} of {os.cpu_count()} cores of an {names[0] if names else 'unnamed CPU'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=704)
    parser.add_argument("--head-width", type=int, default=88)
    parser.add_argument("--tower-layers", type=int, default=12)
    parser.add_argument("--merger-layers", type=int, default=6)
    parser.add_argument("--codes", type=int, default=16_384)
    parser.add_argument("--keep-ratio", type=float, default=1 / 3)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="batch sizes that each side may choose from")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--compile", action="store_true", help="also measure ours with compiled blocks")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, help="write the table there, too")
    arguments = parser.parse_args()
    report = "\n".join(measure(arguments))
    print(report)
    if arguments.output:
        arguments.output.write_text(report + "\n")


def measure(arguments: argparse.Namespace) -> Iterator[str]:
    width, hidden, count = arguments.width, int(arguments.width * MLP_RATIO), arguments.width // arguments.head_width
    config = VisualTokenizerConfig(
        encoder=VisionEncoderConfig(width=width, layers=arguments.tower_layers, head_width=arguments.head_width, mlp_hidden=hidden),
        merger=MergerConfig(layers=arguments.merger_layers, heads=count, mlp_hidden=hidden),
        codebook=CodebookConfig(size=arguments.codes),
        decoder=TokenizerDecoderConfig(depth=1, heads=count, mlp_hidden=hidden),
    )
    patches = config.encoder.num_patches
    torch.manual_seed(0)
    tokenizer = VisualTokenizer(config).requires_grad_(False).eval().to(arguments.device)
    initialise(tokenizer)
    pixels = torch.randn(arguments.images, 3, 224, 224).to(arguments.device)
    noise = keyed_gumbel_noise([str(image) for image in range(len(pixels))], patches, seed=0).to(arguments.device)
    with torch.inference_mode():
        tokenizer.selector.calibrate(tokenizer.selector(tokenizer.encode(pixels[:8])), arguments.keep_ratio)
        yield from tables(arguments, tokenizer, pixels, noise)


if __name__ == "__main__":
    main()
