"""Does the tokenizer train without collapse, and what does the quantizer cost? Each recipe beside the same model without quantizer.

    python benchmarks/tokenizer_recipes.py shapes --runs runs/recipes
    python benchmarks/tokenizer_recipes.py photos --runs runs/recipes --photos ../shared/data/photos/captions.jsonl

`shapes`: K = 1,024 on the quickstart's scenes for three keep ratios. `photos`: K = 16,384 x 32 on random crops of photographs, and the
recipe of those who start from scratch (codes drawn at random that learn by gradient, none revived, everything at once). Runs that are
there already are taken as they are. Writes a table beside this file and curves to docs/.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from tokenizer_recipes_chart import draw
from torch import Tensor

from lavit_dist.checkpoint.official import load_visual_tokenizer
from lavit_dist.config.base import load_config
from lavit_dist.config.images import ImagesConfig
from lavit_dist.config.tokenizer import TrainTokenizerConfig
from lavit_dist.data.image_batches import open_images
from lavit_dist.data.pairs import list_shards, read_pairs
from lavit_dist.evaluation.tokenizer_health import spearman
from lavit_dist.evaluation.tokenizer_scores import TokenizerScores, score_tokenizer
from lavit_dist.models.inference import freeze_for_inference

ROOT = Path(__file__).parents[1]
UNQUANTIZED = ("phases.quantization.quantize=false", "phases.quantization.train=[merger,projection,decoder]")
TOKENS_PER_CODE = 20
"""Tokens that a tokenizer is scored on, per code: a code of a tenth of the mean frequency is then hit with 86 % probability."""
BATCH = 50
FRESH_SEED = 1_000_003
"""Seed of the crops that recipes are scored on, other than those that they were trained on."""


@dataclass(frozen=True)
class Recipe:
    """A training run."""

    name: str
    config: str
    overrides: tuple[str, ...] = ()


SHAPES = [
    Recipe(f"{kind}-{name}", "configs/shapes/tokenizer.yaml", (f"rate.keep_ratio={ratio}", *overrides))
    for name, ratio in (("quarter", 1 / 4), ("third", 1 / 3), ("half", 1 / 2))
    for kind, overrides in (("quantized", ()), ("continuous", UNQUANTIZED))
]
PHOTOS = [
    Recipe("ours", "configs/photos/tokenizer.yaml"),
    Recipe("without quantizer", "configs/photos/tokenizer.yaml", UNQUANTIZED),
    Recipe("naive", "configs/photos/tokenizer_naive.yaml"),
]


@dataclass(frozen=True)
class Row:
    """A recipe's scores on images that it was not trained on."""

    recipe: Recipe
    config: TrainTokenizerConfig
    run_dir: Path
    scores: TokenizerScores
    correlation: float | None
    """Spearman's, of an image's tokens and its objects, where objects are known."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=("shapes", "photos"))
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes"), help="folder of the runs")
    parser.add_argument("--photos", default="../shared/data/photos/captions.jsonl", help="photographs to ingest, for `photos`")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    runs = arguments.runs / arguments.data
    prepare(arguments.data, runs, arguments.photos, arguments.threads)
    rows = [train_and_score(recipe, runs, arguments.threads) for recipe in (SHAPES if arguments.data == "shapes" else PHOTOS)]
    table = markdown(arguments.data, rows)
    print(table)
    (Path(__file__).parent / f"tokenizer_recipes_{arguments.data}.md").write_text(table)
    draw({row.recipe.name: row.run_dir for row in rows}, ROOT / f"docs/tokenizer-recipes-{arguments.data}.png")


def prepare(data: str, runs: Path, photos: str, threads: int) -> None:
    """Pairs, and a tower trained on them."""
    presets = f"configs/{'quickstart' if data == 'shapes' else data}"
    if data == "shapes":
        run(threads, "data_prep/make_shapes.py", f"{presets}/shapes.yaml", "heldout_samples=1000", f"run_dir={runs}/pairs")
    else:
        run(threads, "data_prep/ingest.py", f"{presets}/ingest.yaml", f"source={photos}", f"run_dir={runs}/pairs")
    text = f"{runs}/text_tokenizer"
    run(
        threads,
        "data_prep/train_text_tokenizer.py",
        "configs/quickstart/text_tokenizer.yaml",
        f"run_dir={text}",
        f"pairs={runs}/pairs",
    )
    tower = (f"run_dir={runs}/tower", f"pairs={runs}/pairs/train", f"text_tokenizer={text}")
    run(threads, "launcher/train_tower.py", f"{presets}/tower.yaml", *tower)


def train_and_score(recipe: Recipe, runs: Path, threads: int) -> Row:
    """The recipe's run, made or found, and its scores."""
    run_dir = runs / recipe.name.replace(" ", "_")
    overrides = [f"run_dir={run_dir}", f"images.shards={runs}/pairs/train", f"tower={runs}/tower/model", *recipe.overrides]
    run(threads, "launcher/train_tokenizer.py", recipe.config, *overrides)
    config = load_config(TrainTokenizerConfig, ROOT / recipe.config, overrides)
    tokenizer = freeze_for_inference(load_visual_tokenizer(run_dir / "model"))
    tars = scored_tars(config, runs)
    scores = score_tokenizer(tokenizer, fresh_images(config, tars))
    return Row(recipe, config, run_dir, scores, objects_correlation(tars, scores))


def scored_tars(config: TrainTokenizerConfig, runs: Path) -> Path:
    """Held-out images; where crops are trained on, other crops of the same images."""
    return runs / "pairs" / ("train" if config.images.augmentation.on else "heldout")


def fresh_images(config: TrainTokenizerConfig, tars: Path) -> Iterator[tuple[list[str], Tensor]]:
    """Batches of keys and pixels [image, 3, H, W], as many as give `TOKENS_PER_CODE` in expectation."""
    images = ImagesConfig(shards=str(tars), augmentation=dataclasses.replace(config.images.augmentation, views=None))
    batches = open_images(
        images, image_size=config.encoder.image_size, global_batch_size=BATCH, seed=FRESH_SEED, rank=0, world_size=1
    )
    tokens_per_image = config.rate.keep_ratio * config.encoder.num_patches
    for _ in range(int(TOKENS_PER_CODE * config.codebook.size / tokens_per_image / BATCH)):
        batch = batches.next()
        yield batch.keys, batch.pixel_values
    batches.close()


def objects_correlation(tars: Path, scores: TokenizerScores) -> float | None:
    """How tokens follow the number of objects; None where the pairs don't tell."""
    objects = {
        f"{tar.name}/{pair.key}": len(pair.metadata["objects"])
        for tar in list_shards(tars)
        for pair in read_pairs(tar)[0]
        if "objects" in pair.metadata
    }
    if not objects:
        return None
    tokens = scores.tokens_by_key
    return spearman(list(tokens.values()), [objects[key] for key in tokens])


def markdown(data: str, rows: Sequence[Row]) -> str:
    """The table, each quantized run with its loss as a multiple of that of the run without quantizer."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    lines = [
        f"`python benchmarks/tokenizer_recipes.py {data}`, {date.today():%d %B %Y}, commit {commit}, {os.cpu_count()} CPU cores,"
        f" torch {torch.__version__}.",
        "",
        "| run | steps | loss (1 - cosine) | ratio to the run without quantizer | codes used | perplexity | keep ratio (target) | tokens and objects |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        scores, config = row.scores, row.config
        quantized = any(phase.quantize for phase in config.schedule.values())
        free = next(
            other
            for other in rows
            if other.config.rate == config.rate and not any(phase.quantize for phase in other.config.schedule.values())
        )
        loss = scores.reconstruction_loss if quantized else scores.continuous_reconstruction_loss
        ratio = f"{loss / free.scores.continuous_reconstruction_loss:.3f}" if quantized else ""
        used = f"{scores.codes_used:.1%} of {config.codebook.size:,}" if quantized else ""
        perplexity = f"{scores.perplexity:,.0f}" if quantized else ""
        follows = "" if row.correlation is None else f"{row.correlation:.2f}"
        lines.append(
            f"| {row.recipe.name} | {config.total_steps} | {loss:.4f} | {ratio} | {used} | {perplexity}"
            f" | {scores.keep_ratio:.3f} ({config.rate.keep_ratio:.3f}) | {follows} |"
        )
    images, tokens = rows[0].scores.images, rows[0].scores.tokens
    lines += [
        "",
        f"Scored on {images:,} images, {tokens:,} tokens in the first run; patches sampled with a seed, codes by the published weights.",
    ]
    return "\n".join(lines) + "\n"


def run(threads: int, program: str, config: str, *overrides: str) -> None:
    """A program of the project, unless its work is done already, as it finds out itself."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, program, "--config", config, *overrides], cwd=ROOT, env=environment, check=True)


if __name__ == "__main__":
    main()
