"""How the rows of [IMG], [/IMG] and codes should begin in a language model of text: losses of the steps after, by method.

    python benchmarks/new_rows.py RUN [--text-steps N] [--steps N] [--seeds N] [--learning-rate X] [--output FILE]

RUN is the folder of a quickstart: its captions train a small LLaMA of text, which launcher/pretrain.py then goes on from, on its pairs,
once per method and seed. Batches are the same for all methods; figures are means of the losses over steps and seeds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lavit_dist.config.parameters import NewRows
from lavit_dist.data.id_shard import TEXT, IdShard
from lavit_dist.data.manifest import load_manifest
from lavit_dist.data.text_tokenizer import TextTokenizer

WINDOWS = ((1, 10), (11, 40), (41, 100), (101, 200), (201, 400))
"""First and last step of the means."""
CAPTIONS, TEXT_LEARNING_RATE = 32, 3e-3
"""Captions of a step on text, and its learning rate."""
NEVER = 1_000_000
LOSSES = ("loss", "text_loss", "image_loss")


def train_on_captions(run: Path, folder: Path, steps: int) -> float:
    """Writes a LLaMA of the captions' text to `folder`; returns its last loss."""
    manifest, text = load_manifest(run / "ids" / "train"), TextTokenizer.load(run / "text_tokenizer")
    captions = [
        np.append(ids.astype(np.int64), text.eos_id)
        for record in manifest.shards
        for shard in [IdShard(manifest.folder / record.name)]
        for document in range(len(shard))
        for kind, ids in shard.segments(document)
        if kind == TEXT
    ]
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}
    rest = {"initializer_range": 0.08, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=text.vocab_size, **sizes, **rest))
    optimizer = torch.optim.AdamW(model.parameters(), lr=TEXT_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    random = np.random.default_rng(0)
    for _ in range(steps):
        rows = [torch.from_numpy(captions[index]) for index in random.integers(len(captions), size=CAPTIONS)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        loss = model(ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return loss.item()


def go_on(run: Path, folder: Path, llama: Path | None, method: str, seed: int, arguments: argparse.Namespace) -> list[dict]:
    """The metrics of every step on pairs."""
    model = "hidden_size=128 num_layers=4 num_attention_heads=4 num_key_value_heads=4 ffn_hidden_size=344"
    settings = [f"model.{size}" for size in f"{model} max_position_embeddings=512 init_std={0.02 if llama else 0.08}".split()]
    settings += [f"run_dir={folder}", f"ids={run / 'ids' / 'train'}", f"text_tokenizer={run / 'text_tokenizer'}", f"seed={seed}"]
    settings += [
        f"visual_tokenizer={run / 'tokenizer' / 'model'}",
        f"total_steps={arguments.steps}",
        "precision=fp32",
        "num_threads=1",
    ]
    settings += ["global_batch_size=8", "micro_batch_size=8", "seq_len=256", "caption_dropout=0", f"checkpoint.every_steps={NEVER}"]
    settings += [f"optimizer.learning_rate={arguments.learning_rate}", "optimizer.warmup_steps=10", "logging.tensorboard=false"]
    settings += [f"init_from={llama}", f"new_rows={method}"] if llama else []
    done = subprocess.run([sys.executable, "launcher/pretrain.py", *settings], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def table(curves: dict[str, list[list[dict]]], steps: int) -> list[str]:
    windows = [(first, min(last, steps)) for first, last in WINDOWS if first <= steps]
    lines = []
    for name in LOSSES:
        lines += ["", f"`{name}`", "", "| new rows | " + " | ".join(f"steps {first}-{last}" for first, last in windows) + " |"]
        lines.append("| --- |" + " --- |" * len(windows))
        for method, runs in curves.items():
            means = [np.mean([step[name] for run in runs for step in run[first - 1 : last]]) for first, last in windows]
            lines.append(f"| {method} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--text-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root, run = Path(scratch), arguments.run.resolve()
        loss = train_on_captions(run, root / "llama", arguments.text_steps)
        lines = [f"Text model: {arguments.text_steps} steps, loss {loss:.3f}. Learning rate {arguments.learning_rate}."]
        curves: dict[str, list[list[dict]]] = {}
        for method in (*get_args(NewRows), "no text model"):
            llama = None if method == "no text model" else root / "llama"
            runs = range(arguments.seeds)
            curves[method] = [go_on(run, root / f"{method}-{seed}", llama, method, seed, arguments) for seed in runs]
        lines += table(curves, arguments.steps)
    print("\n".join(lines))
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
