"""Evaluation on held-out pairs: captions, drawn pictures, reconstructions, the tokenizer's health, and the files of a report.

RUN_DIR/original/NAME.png          held-out images as the tower sees them
RUN_DIR/text_to_image/NAME.png     pictures drawn from held-out captions
RUN_DIR/reconstruction/NAME.png    held-out images painted back from their codes
RUN_DIR/keep_masks.npz             one array of bools [patch] per NAME: which patches of the original were kept
RUN_DIR/results.json               written last:
    format_version      2
    captions            a list of {name, key, captions (the truth), generated, tokens}; of procedural scenes also right, whether
                        colour and shape of the main object are
    text_to_image       a list of {name, key, prompt}; of procedural scenes also what the judge has seen {colour, shape}, and right
    reconstruction      a list of {name, key, tokens}, and the same
    tokens              per split {images, keep_ratio, tokens_mean, tokens_std, histogram (images with 0, 1, … tokens)}
    codes               {used (share of the codebook over the training split), perplexity, counts (per code)}
    scores              null for pairs without the ground truth of procedural scenes, else those of `lavit_dist.evaluation.scores`
    repetitions         of how many attempts the models themselves chose each caption, drawn image and painting
    seconds             wall time of each part
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lavit_dist.checkpoint.official import tokenizer_digest
from lavit_dist.config.evaluate import EvaluateConfig
from lavit_dist.config.generate import REPETITIONS, SamplingConfig, one_attempt
from lavit_dist.data.image import to_image
from lavit_dist.data.manifest import load_manifest
from lavit_dist.data.pair_batches import PairDataset, epoch_order
from lavit_dist.data.pairs import SPLITS, PairSample, list_shards
from lavit_dist.data.quarantine import SampleError
from lavit_dist.engine.run_folder import RunFolder
from lavit_dist.evaluation.scores import Attempt, Judge, has_truth, scores_of_tokens
from lavit_dist.evaluation.tokenizer_health import IdStatistics, describe_codes, describe_tokens
from lavit_dist.files import write_atomically
from lavit_dist.generation.language_model import LanguageModel
from lavit_dist.generation.painter import Painter
from lavit_dist.generation.reader import tokenize_repeatedly
from lavit_dist.models.visual_tokenizer import TokenizedImages
from lavit_dist.observe.logs import setup_logging
from lavit_dist.parallel.distributed import device

logger = logging.getLogger(__name__)
T = TypeVar("T")
FORMAT_VERSION = 2
RESULTS = "results.json"


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
        digest = tokenizer_digest(config.decoder)
        for split in SPLITS:
            load_manifest(Path(config.ids) / split).check_tokenizers(visual_tokenizer=digest)
        self.statistics = {split: IdStatistics(Path(config.ids) / split) for split in SPLITS}
        self.painter = Painter.load(config.decoder, config, device())
        self.tokenizer = self.painter.tokenizer
        self.language_model = LanguageModel.load(
            config.language_model,
            visual_tokenizer_digest=digest,
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
        best = self.generate("", samples, tokenizations, config)
        names = [f"{index:04d}" for index in range(len(samples))]
        self.save_pictures("original", names, [to_image(image) for image in pixels])
        self.save_pictures("text_to_image", names, best.drawn)
        self.save_pictures("reconstruction", names, best.repainted)
        np.savez(self.root / "keep_masks.npz", **dict(zip(names, tokenized.keep_mask.cpu().numpy(), strict=True)))
        some = slice(config.num_pictures)
        entries: dict[str, list[dict[str, Any]]] = {
            "captions": [
                {"name": name, "key": sample.key, "captions": sample.captions, "generated": caption, "tokens": len(codes)}
                for name, sample, caption, codes in zip(names, samples, best.captions, tokenized.codes, strict=False)
            ],
            "text_to_image": [
                {"name": name, "key": sample.key, "prompt": sample.captions[0]}
                for name, sample in zip(names[some], samples[some], strict=True)
            ],
            "reconstruction": [
                {"name": name, "key": sample.key, "tokens": len(codes)}
                for name, sample, codes in zip(names[some], samples[some], tokenized.codes[some], strict=True)
            ],
        }
        return {
            "format_version": FORMAT_VERSION,
            **entries,
            "tokens": {
                split: describe_tokens(statistics, self.tokenizer.config.encoder.num_patches)
                for split, statistics in self.statistics.items()
            },
            "codes": describe_codes(self.statistics["train"]),
            "scores": self.score(entries, samples, pixels, tokenizations, best),
            "repetitions": {name: getattr(config, name) for name in REPETITIONS},
            "seconds": {name: round(seconds, 2) for name, seconds in self.seconds.items()},
        }

    def generate(
        self, what: str, samples: Sequence[PairSample], tokenizations: Sequence[TokenizedImages], sampling: SamplingConfig
    ) -> Attempt:
        """Captions of the first `num_captions` images; pictures of the first `num_pictures` captions and of as many images' codes."""
        config, some = self.config, slice(self.config.num_pictures)
        painter = Painter(self.painter.loaded, sampling)
        to_caption = [each.codes[: config.num_captions] for each in tokenizations[: sampling.num_tokenizations]]
        prompts = [sample.captions[0] for sample in samples[some]]
        captions = self.timed(f"{what}captions", lambda: self.language_model.caption(to_caption, sampling))
        codes = self.timed(f"{what}draw codes", lambda: self.language_model.draw(prompts, sampling))
        drawn = self.timed(f"{what}paint drawn codes", lambda: painter.paint(codes, config.seed))
        own_codes = tokenizations[0].codes[some]
        return Attempt(captions, drawn, self.timed(f"{what}paint own codes", lambda: painter.paint(own_codes, config.seed)))

    def score(
        self,
        entries: dict[str, list[dict[str, Any]]],
        samples: Sequence[PairSample],
        pixels: Sequence[Tensor],
        tokenizations: Sequence[TokenizedImages],
        best: Attempt,
    ) -> dict[str, Any] | None:
        """The scores of procedural scenes, and in each entry its verdict; None for pairs that don't say what is in the image."""
        if not all(has_truth(sample) for split in SPLITS for sample in self.pairs[split].samples):
            return None
        once = one_attempt(self.config)
        single = best if once == self.config else self.generate("single ", samples, tokenizations, once)
        judge = self.timed("train the probe", self.train_judge)
        scores = {
            **judge.score(best, samples, entries),
            "single": judge.score(single, samples),
            "probe": judge.of_features(self.encode(pixels), samples),
            "features": judge.of_features(self.reconstruct_features(tokenizations[0]), samples),
            **scores_of_tokens(self.statistics, self.pairs, self.tokenizer.config.encoder.num_patches),
        }
        for name in ("captions", "text_to_image", "reconstruction", "single", "probe", "features", "tokens_and_objects"):
            logger.info("%s: %s", name, scores[name])
        return scores

    def train_judge(self) -> Judge:
        """The judge, trained on real training images."""
        samples, pixels = self.choose("train", self.config.num_probe_images)
        return Judge.train(self.encode, self.encode(pixels), samples, self.tokenizer.config.encoder.image_size, self.config.seed)

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
        return tokenize_repeatedly(self.tokenizer, keys, pixels, self.config, self.config.num_tokenizations)

    @torch.no_grad()
    def encode(self, pixels: Sequence[Tensor]) -> Tensor:
        """The tower's patch features [image, patch, width]."""
        size = self.config.batch_size
        return torch.cat(
            [self.tokenizer.encode(torch.stack(list(pixels[i : i + size])).to(device())) for i in range(0, len(pixels), size)]
        )

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
