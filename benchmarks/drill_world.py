"""What the fault drill trains on: pairs, tokenizers with random weights, ids, and settings of small trainings."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from lavit_dist.checkpoint.official import save_visual_tokenizer
from lavit_dist.config.base import to_dict
from lavit_dist.config.model import CodebookConfig, MergerConfig, TokenizerDecoderConfig, VisionEncoderConfig, VisualTokenizerConfig
from lavit_dist.models.initialisation import initialise
from lavit_dist.models.visual_tokenizer import VisualTokenizer

ROOT = Path(__file__).parents[1]
VISUAL = VisualTokenizerConfig(
    encoder=VisionEncoderConfig(
        image_size=32, patch_size=8, width=32, layers=1, head_width=16, mlp_hidden=64, head_out=32
    ),
    merger=MergerConfig(layers=1, heads=2, mlp_hidden=64),
    codebook=CodebookConfig(size=32, dim=8),
    decoder=TokenizerDecoderConfig(depth=1, heads=2, mlp_hidden=32, unet_dim=16),
)  # fmt: skip


def make_world(world: Path) -> None:
    """WORLD/pairs, WORLD/text_tokenizer, WORLD/tokenizer and WORLD/ids, by the project's own programs."""
    if (world / "ids/train/manifest.json").exists():
        return
    shapes = [f"run_dir={world}/pairs", "train_samples=300", "heldout_samples=20", "image_size=32"]
    _call("data_prep/make_shapes.py", *shapes)
    _call("data_prep/train_text_tokenizer.py", f"run_dir={world}/text_tokenizer", f"pairs={world}/pairs/train", "vocab_size=300")
    torch.manual_seed(0)
    visual = VisualTokenizer(VISUAL)
    initialise(visual)
    save_visual_tokenizer(visual, world / "tokenizer")
    made = [f"tokenizer={world}/tokenizer", f"text_tokenizer={world}/text_tokenizer", f"pairs={world}/pairs"]
    _call("data_prep/pretokenize.py", f"run_dir={world}/ids", *made, "ray.num_cpus=1")


def settings_of(name: str, world: Path, steps: int, save_every: int, hang_seconds: float) -> dict[str, Any]:
    """The settings file of a training of so many steps."""
    shared: dict[str, Any] = {
        "seed": 1,
        "num_threads": 1,
        "checkpoint": {"every_steps": save_every, "keep_last": 3},
        "logging": {"every_steps": 10, "tensorboard": False},
        "faults": {"hang_seconds": hang_seconds},
        "global_batch_size": 8,
    }
    adamw = {"learning_rate": 1e-3, "warmup_steps": 2}
    if name == "pretrain":
        return shared | {
            "ids": f"{world}/ids/train",
            "text_tokenizer": f"{world}/text_tokenizer",
            "plan_cache": f"{world}/plans",
            "model": {
                "hidden_size": 64,
                "num_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "ffn_hidden_size": 128,
                "max_position_embeddings": 128,
            },
            "seq_len": 128,
            "micro_batch_size": 2,
            "total_steps": steps,
            "optimizer": adamw,
            "parallel": {"pipeline_parallel_size": 2},
        }
    if name == "decoder":
        return shared | {
            "global_batch_size": 2,
            "pairs": f"{world}/pairs/train",
            "tokenizer": f"{world}/tokenizer",
            "image_size": 32,
            "model": {
                "block_out_channels": [32, 32],
                "cross_attention": [True, True],
                "layers_per_block": 1,
                "attention_head_dim": 4,
                "norm_num_groups": 8,
                "latent": "pixel_unshuffle",
                "latent_factor": 2,
                "latent_channels": 12,
                "concatenate_condition": True,
                "prediction_type": "sample",
            },
            "total_steps": steps,
            "optimizer": adamw | {"name": "muon"},
            "zero_stage": 0,
        }
    return shared | {
        **{part: to_dict(VISUAL)[part] for part in ("encoder", "merger", "codebook", "decoder")},
        "tower": f"{world}/tokenizer",
        "images": {"shards": f"{world}/pairs/train"},
        "phases": {
            "selection": {
                "steps": steps // 2,
                "train": ["selector", "merger", "projection", "decoder"],
                "quantize": False,
                "selection": "random",
                "selector_signal": "reconstruction_error",
                "schedule": "constant",
            },
            "quantization": {
                "steps": steps - steps // 2,
                "train": ["merger", "projection", "codebook", "decoder"],
                "quantize": True,
                "calibrate_selector": True,
            },
        },
        "kmeans_batches": 2,
        "commitment_cost": 0.25,
        "ema_decay": 0.9,
        "zero_stage": 2,
        "precision": "fp32",
        "optimizer": adamw,
        "health": {"continuous_every_steps": 4, "sheet_every_steps": 0},
    }


def _call(program: str, *settings: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, program, *settings], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
