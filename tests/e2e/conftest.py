"""Small untrained models and pairs that fit together, for the entry points that read trained ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lavit_dist.checkpoint.official import save_visual_tokenizer, tokenizer_digest
from lavit_dist.config.make_shapes import MakeShapesConfig
from lavit_dist.data.id_shard import Encoding
from lavit_dist.data.id_shard_writer import write_id_shard
from lavit_dist.data.manifest import write_manifest
from lavit_dist.data.pairs import list_shards, read_pairs
from lavit_dist.data.text_tokenizer import train_text_tokenizer
from lavit_dist.models.visual_tokenizer import VisualTokenizer
from lavit_dist.models.vocabulary import Vocabulary
from pipelines.make_shapes import make_shapes
from tests.encode_tar import encode_tar
from tests.small_tokenizer import SMALL

VISUAL = SMALL
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pairs/ and ids/ with both splits, tokenizer/ and language_model/."""
    root = tmp_path_factory.mktemp("world")
    make_shapes(MakeShapesConfig(run_dir=str(root / "pairs"), train_samples=60, heldout_samples=12, image_size=32))
    pairs = [pair for tar in list_shards(root / "pairs/train") for pair in read_pairs(tar)[0]]
    text = train_text_tokenizer([caption for pair in pairs for caption in pair.captions], 300, root / "language_model")

    torch.manual_seed(0)
    visual = VisualTokenizer(VISUAL).requires_grad_(False).eval()
    save_visual_tokenizer(visual, root / "tokenizer")
    digest = tokenizer_digest(root / "tokenizer")
    encoding = Encoding(digest, text.digest, "preprocessing", "settings", text.vocab_size, VISUAL.codebook.size)
    for split in ("train", "heldout"):
        documents = [document for tar in list_shards(root / "pairs" / split) for document in encode_tar(visual, text, tar)[0]]
        path = root / "ids" / split / "shard-00000.arrow"
        write_manifest(path.parent, [write_id_shard(path, documents, encoding=encoding, inputs=())])

    from transformers import LlamaConfig, LlamaForCausalLM  # takes seconds to import

    vocabulary = Vocabulary(text.vocab_size, VISUAL.codebook.size)
    LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary.size, **LLAMA)).save_pretrained(root / "language_model")
    facts = {"text_size": text.vocab_size, "codebook_size": 24, "eos_id": text.eos_id, "visual_tokenizer_digest": digest}
    (root / "language_model" / "lavit.json").write_text(json.dumps(facts))
    return root


@pytest.fixture(scope="session")
def decoder_config(tiny_world: Path) -> Path:
    """Settings of a short decoder training on the tiny world."""
    settings = {
        "pairs": str(tiny_world / "pairs/train"),
        "tokenizer": str(tiny_world / "tokenizer"),
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
        "total_steps": 6,
        "global_batch_size": 8,
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "checkpoint": {"every_steps": 3},
        "logging": {"every_steps": 2, "tensorboard": False},
        "num_threads": 1,
    }
    path = tiny_world / "decoder.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="session")
def tiny_decoder(tiny_world: Path, decoder_config: Path, repo_root: Path) -> Path:
    """The run folder of that training, as one plain process."""
    run_dir = tiny_world / "decoder"
    command = [sys.executable, "launcher/train_decoder.py", "--config", str(decoder_config), f"run_dir={run_dir}"]
    subprocess.run(command, cwd=repo_root, timeout=180, check=True, capture_output=True)
    return run_dir
