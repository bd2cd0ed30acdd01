"""launcher/generate.py and launcher/evaluate.py on small untrained models: every mode, its files, and what is refused."""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lavit_dist.config.evaluate import EvaluateConfig
from lavit_dist.config.generate import GenerateConfig
from lavit_dist.data.id_shard import IMAGE, IdShard
from lavit_dist.data.manifest import load_manifest
from lavit_dist.data.pairs import list_shards, read_pairs
from lavit_dist.data.tar_reader import read_bytes
from lavit_dist.errors import UserError
from pipelines.evaluate import run as evaluate
from pipelines.generate import draw


@pytest.fixture(scope="module")
def launch(repo_root, tiny_world, tiny_decoder, tmp_path_factory):
    """`launch(script, *arguments)`: the entry point with settings that name the tiny models."""
    settings = tmp_path_factory.mktemp("config") / "settings.yaml"
    settings.write_text(
        f"language_model: {tiny_world / 'language_model'}\ndecoder: {tiny_decoder / 'model'}\n"
        "num_inference_steps: 2\nmax_caption_tokens: 8\nnum_threads: 1\n"
    )

    def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, f"launcher/{script}.py", *arguments, "--config", str(settings)]
        return subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=180, check=False)

    return run


@pytest.fixture(scope="module")
def images(tiny_world, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    pairs, _ = read_pairs(list_shards(tiny_world / "pairs/heldout")[0])
    for pair in pairs[:3]:
        (folder / f"{pair.key}.jpg").write_bytes(read_bytes(pair.image_location))
    return sorted(map(str, folder.iterdir()))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_captions_go_to_files_and_a_sheet(launch, images, tmp_path):
    result = launch("generate", "caption", *images, f"out={tmp_path}")
    assert result.returncode == 0, result.stderr
    records = lines(tmp_path / "captions.jsonl")
    assert [record["image"] for record in records] == images
    assert (tmp_path / "captions.txt").read_text().splitlines() == [record["caption"] for record in records]
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert min(sheet.size) > 192


def test_prompts_become_pictures(launch, tmp_path):
    prompts = ["a red circle", "a blue square on the left"]
    result = launch("generate", "image", *prompts, f"out={tmp_path}", "guidance_scale=3", "seed=4")
    assert result.returncode == 0, result.stderr
    records = lines(tmp_path / "pictures.jsonl")
    assert [record["prompt"] for record in records] == prompts
    for record in records:
        with Image.open(tmp_path / record["file"]) as picture:
            assert picture.size == (32, 32)
    assert (tmp_path / "contact_sheet.png").exists()


def test_reconstructions_use_the_ids_of_pretokenize(launch, images, tiny_world, tmp_path):
    result = launch("generate", "reconstruct", *images, f"out={tmp_path}")
    assert result.returncode == 0, result.stderr
    shard = IdShard(tiny_world / "ids/heldout/shard-00000.arrow")
    lengths = {
        key: len(next(ids for kind, ids in shard.segments(document) if kind == IMAGE))
        for document, key in enumerate(shard.column("key"))
    }
    for record in lines(tmp_path / "pictures.jsonl"):
        assert (tmp_path / record["file"]).exists()
        assert record["tokens"] == lengths[Path(record["image"]).stem]


def test_an_evaluation_writes_scores_pictures_and_masks(launch, tiny_world, tmp_path):
    settings = (
        f"run_dir={tmp_path}",
        f"pairs={tiny_world / 'pairs'}",
        f"ids={tiny_world / 'ids'}",
        "num_captions=8",
        "num_pictures=4",
    )
    result = launch("evaluate", *settings)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert [len(results[part]) for part in ("captions", "text_to_image", "reconstruction")] == [8, 4, 4]
    for part in ("captions", "probe", "text_to_image", "reconstruction", "features"):
        assert all(0 <= results["scores"][part][name] <= 1 for name in ("colour", "shape", "all"))
    assert results["scores"]["single"].keys() == {"captions", "text_to_image", "reconstruction"}
    assert -1 <= results["scores"]["tokens_and_objects"] <= 1
    assert 0 < results["codes"]["used"] <= 1
    assert sum(results["tokens"]["train"]["histogram"]) == results["tokens"]["train"]["images"] == 60
    masks = np.load(tmp_path / "keep_masks.npz")
    for record in results["reconstruction"]:
        for folder in ("original", "text_to_image", "reconstruction"):
            assert (tmp_path / folder / f"{record['name']}.png").exists()
        assert masks[record["name"]].sum() == record["tokens"]


def test_ids_of_another_tokenizer_are_refused(launch, tiny_world, tmp_path):
    shutil.copytree(tiny_world / "ids", tmp_path / "ids")
    manifest = tmp_path / "ids/train/manifest.json"
    manifest.write_text(manifest.read_text().replace(load_manifest(manifest.parent).encoding.visual_tokenizer, "0" * 64))
    settings = (f"run_dir={tmp_path / 'run'}", f"pairs={tiny_world / 'pairs'}", f"ids={tmp_path / 'ids'}")
    result = launch("evaluate", *settings)
    assert result.returncode == 2
    assert "visual_tokenizer 0000000000000000" in result.stderr
    assert not (tmp_path / "run").exists()


def test_the_most_probable_patches_do_not_depend_on_the_seed(launch, images, tmp_path):
    tokens = []
    for seed in (0, 1):
        result = launch("generate", "reconstruct", *images, f"out={tmp_path / str(seed)}", "selection=argmax", f"seed={seed}")
        assert result.returncode == 0, result.stderr
        tokens.append([record["tokens"] for record in lines(tmp_path / str(seed) / "pictures.jsonl")])
    assert tokens[0] == tokens[1]


def test_pairs_without_ground_truth_are_shown_but_not_scored(tiny_world, tiny_decoder, tmp_path):
    for split in ("train", "heldout"):
        (tmp_path / "pairs" / split).mkdir(parents=True)
        with (
            tarfile.open(tiny_world / "pairs" / split / "00000.tar") as full,
            tarfile.open(tmp_path / "pairs" / split / "00000.tar", "w") as plain,
        ):
            for member in full:
                if not member.name.endswith(".json"):
                    plain.addfile(member, full.extractfile(member))
    config = EvaluateConfig(
        run_dir=str(tmp_path / "run"),
        pairs=str(tmp_path / "pairs"),
        ids=str(tiny_world / "ids"),
        decoder=str(tiny_decoder / "model"),
        language_model=str(tiny_world / "language_model"),
        num_captions=3,
        num_pictures=2,
        num_inference_steps=1,
        max_caption_tokens=4,
    )
    evaluate(config)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["scores"] is None
    assert [len(results[part]) for part in ("captions", "text_to_image", "reconstruction")] == [3, 2, 2]
    written = (tmp_path / "run/results.json").stat().st_mtime_ns
    evaluate(config)  # says that the results are there, and leaves them
    assert (tmp_path / "run/results.json").stat().st_mtime_ns == written


def test_a_truncated_image_is_one_sentence_before_anything_is_written(launch, images, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(Path(images[0]).read_bytes()[:200])
    result = launch("generate", "caption", images[0], str(broken), f"out={tmp_path / 'out'}")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert str(broken) in result.stderr
    assert not (tmp_path / "out").exists()


def test_mistakes_in_words_and_settings_cost_no_import_of_models(launch):
    for arguments, named in ((["image"], "prompts"), (["image", "a star", "guidence_scale=2"], "guidance_scale")):
        result = launch("generate", *arguments)
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1
        assert named in result.stderr


def test_models_that_are_missing_or_do_not_fit_are_named(tiny_world, tiny_decoder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_world / "language_model", other)
    facts = json.loads((other / "lavit.json").read_text()) | {"visual_tokenizer_digest": "0" * 64}
    (other / "lavit.json").write_text(json.dumps(facts))
    fitting = {"decoder": str(tiny_decoder / "model"), "language_model": str(tiny_world / "language_model")}
    for changes, named in (
        ({"language_model": None}, "language_model is not set"),
        ({"language_model": "/nowhere"}, "/nowhere"),
        ({"language_model": str(other)}, "0000000000000000"),
        ({"decoder": str(tiny_world)}, "pixel_decoding"),
        ({"decoder": None, "tokenizer": str(tiny_world / "tokenizer")}, "decoder is not set"),
    ):
        with pytest.raises(UserError, match=named):
            draw(GenerateConfig(**(fitting | changes), out=str(tmp_path / "out")), ["a star"])
    assert not (tmp_path / "out").exists()
