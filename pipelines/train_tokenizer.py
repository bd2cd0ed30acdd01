"""Visual tokenizer training: frozen tower and images to the tokenizer's folder in the released layout."""

from __future__ import annotations

import logging
from pathlib import Path

from lavit_dist.checkpoint.official import load_vision_encoder, save_visual_tokenizer
from lavit_dist.checkpoint.store import CheckpointStore
from lavit_dist.config.tokenizer import TrainTokenizerConfig
from lavit_dist.data.pairs import PairBatches, PairDataset, list_shards
from lavit_dist.engine.loop import run_training
from lavit_dist.engine.run_folder import RunFolder
from lavit_dist.engine.tokenizer_training import TokenizerTraining
from lavit_dist.models.initialisation import initialise
from lavit_dist.models.visual_tokenizer import VisualTokenizer
from lavit_dist.observe.logs import setup_logging
from lavit_dist.observe.metrics import MetricsCallback
from lavit_dist.parallel.apex import check_apex
from lavit_dist.parallel.distributed import init_distributed, rank, seed_everything, world_size

logger = logging.getLogger(__name__)


def run(config: TrainTokenizerConfig) -> None:
    """Trains, or resumes, or says that the tokenizer is already there; RUN_DIR/model/visual_tokenizer holds it."""
    setup_logging()
    check_apex()
    folder = RunFolder(config.run_dir)
    folder.check_config(config)
    if folder.done:
        logger.info("%s is already there", folder.model)
        return
    encoder = load_vision_encoder(config.tower, config.encoder)
    dataset = PairDataset(list_shards(config.pairs), config.encoder.image_size, max_pixels=config.max_pixels)
    batches = PairBatches(dataset, config.global_batch_size, config.seed, rank(), world_size())

    init_distributed(config.num_threads)
    folder.open(config)
    seed_everything(config.seed)
    tokenizer = VisualTokenizer(config.model)
    initialise(tokenizer)
    tokenizer.encoder = encoder
    tokenizer.decoder.unet_proj.requires_grad_(False)  # train_decoder trains it
    run_training(
        TokenizerTraining(config, tokenizer, batches),
        total_steps=config.total_steps,
        store=CheckpointStore(folder.checkpoints),
        checkpoint=config.checkpoint,
        callbacks=[MetricsCallback(Path(config.run_dir), config.logging)],
    )
    folder.publish(lambda out: save_visual_tokenizer(tokenizer, out))
