"""Visual tokenizer training: frozen tower and images to the tokenizer's folder in the released layout."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import torch
from torch import Tensor

from lavit_dist.checkpoint.official import (
    load_vision_encoder,
    load_visual_tokenizer,
    save_visual_tokenizer,
    vision_encoder_digest,
)
from lavit_dist.config.tokenizer import TrainTokenizerConfig
from lavit_dist.data.image_batches import ImageBatches, open_images
from lavit_dist.engine.feature_cache import FeatureCache
from lavit_dist.engine.loop import Callback, run_training
from lavit_dist.engine.run_folder import RunFolder
from lavit_dist.engine.tokenizer_training import TokenizerTraining
from lavit_dist.errors import check
from lavit_dist.evaluation.sheet_callback import SampleSheetCallback
from lavit_dist.models.initialisation import initialise
from lavit_dist.models.visual_tokenizer import VisualTokenizer
from lavit_dist.observe.collapse import CollapseDetector
from lavit_dist.observe.logs import setup_logging
from lavit_dist.observe.metrics import MetricsCallback
from lavit_dist.observe.symptoms import Setup
from lavit_dist.parallel.apex import check_apex
from lavit_dist.parallel.distributed import init_distributed, rank, seed_everything, world_size
from lavit_dist.parallel.outside_faults import outside_faults_told

logger = logging.getLogger(__name__)


def run(config: TrainTokenizerConfig) -> None:
    """Trains, or resumes, or says that the tokenizer is already there; RUN_DIR/model/visual_tokenizer holds it."""
    setup_logging()
    check_apex()
    folder = RunFolder(config.run_dir, may_change=("micro_batch_size", "zero_stage"))  # checkpoints don't depend on it
    folder.check_config(config)
    if folder.done:
        logger.info("%s is already there", folder.model)
        return
    _check_batch(config, world_size())
    tokenizer = _tokenizer(config)
    images = open_images(
        config.images,
        image_size=config.encoder.image_size,
        global_batch_size=config.global_batch_size,
        seed=config.seed,
        rank=rank(),
        world_size=world_size(),
    )
    pictures = _sheet_pictures(config)

    init_distributed(config.num_threads, config.faults.hang_seconds)
    folder.open(config)
    digest = vision_encoder_digest(config.tower, config.encoder)
    with outside_faults_told(
        "while the model was built", advice=TokenizerTraining.memory_advice, retry=folder.checkpoints.exists()
    ):
        training = TokenizerTraining(config, tokenizer, images, _feature_cache(config, tokenizer, images, digest), digest)
    done = run_training(
        training,
        run_dir=folder.root,
        total_steps=config.total_steps,
        checkpoint=config.checkpoint,
        faults=config.faults,
        config=config,
        callbacks=[MetricsCallback(folder.root, config.logging), *_watchers(config, training, pictures)],
    )
    training.write_quarantine()
    images.close()
    if done:
        folder.publish(lambda out: save_visual_tokenizer(training.product(), out))


def _feature_cache(
    config: TrainTokenizerConfig, tokenizer: VisualTokenizer, images: ImageBatches, tower_digest: str
) -> FeatureCache:
    """Features of the frozen tower, remembered within the budgets."""
    augmentation = config.images.augmentation
    repeats = not augmentation.on or augmentation.views is not None
    if not repeats and (config.feature_cache_bytes or config.feature_disk_bytes):
        logger.info("features are not cached, since no view of an image comes twice; images.augmentation.views would bound them")
    disk = config.feature_disk_bytes if repeats else 0
    names = json.dumps(images.state_dict()["fingerprint"], sort_keys=True)
    return FeatureCache(
        lambda _, pixel_values: tokenizer.encode(pixel_values),
        memory_bytes=config.feature_cache_bytes if repeats else 0,
        disk_bytes=disk,
        folder=(config.feature_folder or Path(config.run_dir) / "features") if disk else None,
        digest=f"{tower_digest} {config.precision} {names}" if disk else "",
        dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
    )


def _sheet_pictures(config: TrainTokenizerConfig) -> tuple[Tensor, Tensor] | None:
    """The pictures of the sample sheets and those of their bank, [image, 3, H, W] each, on rank 0 where sheets are wanted."""
    health = config.health
    if not health.sheet_every_steps or rank() != 0:
        return None
    images = open_images(
        dataclasses.replace(config.images, streams=1, prefetch_batches=1),
        image_size=config.encoder.image_size,
        global_batch_size=health.sheet_images + health.sheet_bank_images,
        seed=config.seed,
        rank=0,
        world_size=1,
    )
    try:
        shown, bank = images.next().pixel_values.split([health.sheet_images, health.sheet_bank_images])
    finally:
        images.close()
    return shown, bank


def _watchers(config: TrainTokenizerConfig, training: TokenizerTraining, pictures: tuple[Tensor, Tensor] | None) -> list[Callback]:
    """What looks after the tokenizer's health."""
    health = config.health
    setup = Setup(
        codebook_size=config.codebook.size,
        keep_ratio=config.rate.keep_ratio,
        usage_window_steps=health.usage_window_steps,
        images_may_differ=config.rate.per != "image",
    )
    watchers: list[Callback] = [CollapseDetector(health.collapse, setup)]
    if pictures is not None:
        shown, bank = pictures
        watchers.append(
            SampleSheetCallback(
                Path(config.run_dir), health.sheet_every_steps, training.tokenizer, shown, bank, training.token_counts
            )
        )
    return watchers


def _tokenizer(config: TrainTokenizerConfig) -> VisualTokenizer:
    """The tokenizer to start with: new, or that of `initial`, over the frozen tower."""
    encoder = load_vision_encoder(config.tower, config.encoder)
    seed_everything(config.seed)
    if config.initial is None:
        tokenizer = VisualTokenizer(config.model)
        initialise(tokenizer)
    else:
        tokenizer = load_visual_tokenizer(config.initial, config=config.model)
        tokenizer.highres_decoder = tokenizer.understanding = None  # they belong to the codes and the merger as they were
    tokenizer.encoder = encoder
    return tokenizer


def _check_batch(config: TrainTokenizerConfig, ranks: int) -> None:
    share = config.global_batch_size // ranks
    check(
        config.global_batch_size % ranks == 0,
        f"global_batch_size {config.global_batch_size} can't be shared out to {ranks} ranks; choose a multiple of {ranks}.",
    )
    check(
        share % (config.micro_batch_size or share) == 0,
        f"micro_batch_size {config.micro_batch_size} does not divide the {share} images of each of {ranks} ranks; choose a divisor.",
    )
