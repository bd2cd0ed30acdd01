"""Evaluation on held-out pairs: captions, drawn pictures, reconstructions, the tokenizer's health, and the files of a report.

RUN_DIR/original/NAME.png          held-out images as the tower sees them
RUN_DIR/text_to_image/NAME.png     pictures drawn from held-out captions
RUN_DIR/reconstruction/NAME.png    held-out images painted back from their codes
RUN_DIR/keep_masks.npz             one array of bools [patch] per NAME: which patches of the original were kept
RUN_DIR/results.json               written last:
    format_version      1
    captions            a list of {name, key, captions (the truth), generated, tokens}; of procedural scenes also right, whether
                        colour and shape of the main object are
    text_to_image       a list of {name, key, prompt}; of procedural scenes also what the judge has seen {colour, shape}, and right
    reconstruction      a list of {name, key, tokens}, and the same
    tokens              per split {images, keep_ratio, tokens_mean, tokens_std, histogram (images with 0, 1, … tokens)}
    codes               {used (share of the codebook over the training split), perplexity, counts (per code)}
    scores              null for pairs without the ground truth of procedural scenes, else
        captions            shares right of {colour, shape, all (both), position, count}, and how many captions state the last two
        probe               the judge itself, on real held-out images: shares right of {colour, shape, all}
        text_to_image       what the judge sees in the drawn pictures: the same shares
        reconstruction      the same for the painted reconstructions
        features            the same for the tokenizer's reconstructed features, before anything is painted
        tokens_and_objects  Spearman's rank correlation of an image's tokens and its number of objects
        tokens_by_objects   per number of objects, how many images have 0, 1, … tokens
    repetitions         of how many attempts the models themselves chose each caption, drawn image and painting
    seconds             wall time of each part
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lavit_dist.checkpoint.official import tokenizer_digest
from lavit_dist.config.evaluate import EvaluateConfig
from lavit_dist.config.generate import REPETITIONS
from lavit_dist.data.image import preprocess, to_image
from lavit_dist.data.pairs import PairDataset, PairSample, epoch_order, list_shards
from lavit_dist.data.quarantine import SampleError
from lavit_dist.engine.run_folder import RunFolder
from lavit_dist.evaluation.captions import main_objects_right, score_captions
from lavit_dist.evaluation.probe import AttentionProbe, shares_right, train_probe
from lavit_dist.evaluation.tokenizer_health import (
    IdStatistics,
    describe_codes,
    describe_tokens,
    tokens_by_objects,
    tokens_follow_objects,
)
from lavit_dist.files import write_atomically
from lavit_dist.generation.language_model import LanguageModel
from lavit_dist.generation.painter import Painter
from lavit_dist.generation.reader import tokenize_repeatedly
from lavit_dist.models.visual_tokenizer import TokenizedImages
from lavit_dist.observe.logs import setup_logging
from lavit_dist.parallel.distributed import device

logger = logging.getLogger(__name__)
T = TypeVar("T")
FORMAT_VERSION = 1
RESULTS = "results.json"
SPLITS = ("train", "heldout")
JUDGED = ("colour", "shape")


def run(config: EvaluateConfig) -> None:
    """Evaluates, or says that the results are already there."""
    setup_logging()
    folder = RunFolder(config.run_dir)
    folder.check_config(config)
    if (folder.root / RESULTS).exists():
        logger.info("%s is already there", folder.root / RESULTS)
        return
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    evaluation = Evaluation(config)
    folder.open(config)
    write_atomically(folder.root / RESULTS, json.dumps(evaluation.run(), indent=1, ensure_ascii=False).encode())
    logger.info("wrote %s", folder.root / RESULTS)


class Evaluation:
    """The models and the pairs of one evaluation."""

    def __init__(self, config: EvaluateConfig) -> None:
        self.config = config
        self.root = Path(config.run_dir)
        self.seconds: dict[str, float] = {}
        self.statistics = {split: IdStatistics(Path(config.ids) / split) for split in SPLITS}
        self.painter = Painter.load(config.decoder, config, device())
        self.tokenizer = self.painter.tokenizer
        self.language_model = LanguageModel.load(
            config.language_model,
            visual_tokenizer_digest=tokenizer_digest(config.decoder),
            num_patches=self.tokenizer.config.encoder.num_patches,
            batch_size=config.batch_size,
            device=device(),
        )
        size = self.tokenizer.config.encoder.image_size
        self.pairs = {split: PairDataset(list_shards(Path(config.pairs) / split), size) for split in SPLITS}

    def run(self) -> dict[str, Any]:
        """Everything in the order of results.json."""
        config = self.config
        samples, pixels = self.choose("heldout", max(config.num_captions, config.num_pictures))
        tokenizations = self.timed("tokenize", lambda: self.tokenize(samples, pixels))
        tokenized = tokenizations[0]
        to_caption = [each.codes[: config.num_captions] for each in tokenizations]
        captions = self.timed("captions", lambda: self.language_model.caption(to_caption, config))
        some = slice(config.num_pictures)
        prompts = [sample.captions[0] for sample in samples[some]]
        drawn_codes = self.timed("draw codes", lambda: self.language_model.draw(prompts, config))
        drawn = self.timed("paint drawn codes", lambda: self.painter.paint(drawn_codes, config.seed))
        repainted = self.timed("paint own codes", lambda: self.painter.paint(tokenized.codes[some], config.seed))
        names = [f"{index:04d}" for index in range(len(samples))]
        self.save_pictures("original", names, [to_image(image) for image in pixels])
        self.save_pictures("text_to_image", names, drawn)
        self.save_pictures("reconstruction", names, repainted)
        np.savez(self.root / "keep_masks.npz", **dict(zip(names, tokenized.keep_mask.cpu().numpy(), strict=True)))
        entries: dict[str, list[dict[str, Any]]] = {
            "captions": [
                {"name": name, "key": sample.key, "captions": sample.captions, "generated": caption, "tokens": len(codes)}
                for name, sample, caption, codes in zip(names, samples, captions, tokenized.codes, strict=False)
            ],
            "text_to_image": [
                {"name": name, "key": sample.key, "prompt": prompt}
                for name, sample, prompt in zip(names, samples, prompts, strict=False)
            ],
            "reconstruction": [
                {"name": name, "key": sample.key, "tokens": len(codes)}
                for name, sample, codes in zip(names[some], samples[some], tokenized.codes[some], strict=True)
            ],
        }
        scores = self.score(entries, samples, pixels, tokenized, drawn, repainted)
        return {
            "format_version": FORMAT_VERSION,
            **entries,
            "tokens": {
                split: describe_tokens(statistics, self.tokenizer.config.encoder.num_patches)
                for split, statistics in self.statistics.items()
            },
            "codes": describe_codes(self.statistics["train"]),
            "scores": scores,
            "repetitions": {name: getattr(config, name) for name in REPETITIONS},
            "seconds": {name: round(seconds, 2) for name, seconds in self.seconds.items()},
        }

    def score(
        self,
        entries: Mapping[str, list[dict[str, Any]]],
        samples: Sequence[PairSample],
        pixels: Sequence[Tensor],
        tokenized: TokenizedImages,
        drawn: Sequence[Image.Image],
        repainted: Sequence[Image.Image],
    ) -> dict[str, Any] | None:
        """The scores of procedural scenes, and in each entry its verdict; None for pairs that don't say what is in the image."""
        if not all(_has_truth(sample) for split in SPLITS for sample in self.pairs[split].samples):
            return None
        probe = self.timed("train the probe", self.train_probe)
        truth = [_main_object(sample) for sample in samples]

        def judge(features: Tensor, entries: Sequence[dict[str, Any]] = ()) -> dict[str, float]:
            seen = probe.name(features)
            for entry, in_picture, asked in zip(entries, seen, truth, strict=False):
                entry |= {"seen": in_picture, "right": in_picture == asked}
            return shares_right(seen, truth[: len(features)])

        captions = [entry["generated"] for entry in entries["captions"]]
        scenes = [sample.metadata for sample in samples[: len(captions)]]
        for entry, right in zip(entries["captions"], main_objects_right(captions, scenes)["all"], strict=True):
            entry["right"] = right
        objects = {sample.key: len(sample.metadata["objects"]) for split in SPLITS for sample in self.pairs[split].samples}
        tokens = self.statistics["train"].tokens | self.statistics["heldout"].tokens
        scores = {
            "captions": score_captions(captions, scenes),
            "probe": judge(self.encode(pixels)),
            "text_to_image": judge(self.encode_pictures(drawn), entries["text_to_image"]),
            "reconstruction": judge(self.encode_pictures(repainted), entries["reconstruction"]),
            "features": judge(self.reconstruct_features(tokenized)),
            "tokens_and_objects": tokens_follow_objects(tokens, objects),
        }
        for name, of_part in scores.items():
            logger.info("%s: %s", name, of_part)
        return scores | {"tokens_by_objects": tokens_by_objects(tokens, objects, self.tokenizer.config.encoder.num_patches)}

    def train_probe(self) -> AttentionProbe:
        """The judge, trained on real training images."""
        samples, pixels = self.choose("train", self.config.num_probe_images)
        return train_probe(self.encode(pixels), [_main_object(sample) for sample in samples], self.config.seed)

    def choose(self, split: str, number: int) -> tuple[list[PairSample], list[Tensor]]:
        """Up to `number` pairs of a split with a readable image, and their pixels [3, H, W]; which ones follows from the seed."""
        dataset = self.pairs[split]
        samples: list[PairSample] = []
        pixels: list[Tensor] = []
        for index in epoch_order(len(dataset), self.config.seed, 0).tolist():
            if len(samples) == number:
                break
            try:
                pixels.append(dataset.pixels(index))
            except SampleError as error:
                logger.warning("%s is skipped: %s", dataset.samples[index].key, error)
                continue
            samples.append(dataset.samples[index])
        return samples, pixels

    def tokenize(self, samples: Sequence[PairSample], pixels: Sequence[Tensor]) -> list[TokenizedImages]:
        """`num_tokenizations` tokenizations; the first gives the codes that pretokenize made of the same pairs."""
        keys = [sample.key for sample in samples]
        seed, times, size = self.config.seed, self.config.num_tokenizations, self.config.batch_size
        return tokenize_repeatedly(self.tokenizer, keys, pixels, seed=seed, times=times, batch_size=size)

    @torch.no_grad()
    def encode(self, pixels: Sequence[Tensor]) -> Tensor:
        """The tower's patch features [image, patch, width]."""
        size = self.config.batch_size
        return torch.cat(
            [self.tokenizer.encode(torch.stack(list(pixels[i : i + size])).to(device())) for i in range(0, len(pixels), size)]
        )

    def encode_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """The tower's patch features of painted pictures [image, patch, width]."""
        size = self.tokenizer.config.encoder.image_size
        return self.encode([preprocess(picture, size) for picture in pictures])

    @torch.no_grad()
    def reconstruct_features(self, tokenized: TokenizedImages) -> Tensor:
        """The features that the tokenizer makes of its own codes [image, patch, width]."""
        size, codes = self.config.batch_size, tokenized.codes
        return torch.cat([self.tokenizer.reconstruct(codes[i : i + size]) for i in range(0, len(codes), size)])

    def save_pictures(self, folder: str, names: Sequence[str], pictures: Sequence[Image.Image]) -> None:
        """Writes the pictures under their names, as PNG."""
        (self.root / folder).mkdir(parents=True, exist_ok=True)
        for name, picture in zip(names, pictures, strict=False):
            picture.save(self.root / folder / f"{name}.png")

    def timed(self, part: str, action: Callable[[], T]) -> T:
        """What `action` returns; its wall time goes to the log and to results.json."""
        start = time.perf_counter()
        result = action()
        self.seconds[part] = time.perf_counter() - start
        logger.info("%s: %.1f s", part, self.seconds[part])
        return result


def _has_truth(sample: PairSample) -> bool:
    return bool(sample.metadata.get("objects"))


def _main_object(sample: PairSample) -> Mapping[str, str]:
    main = sample.metadata["objects"][0]
    return {name: main[name] for name in JUDGED}
