"""Contrastive training of a small vision tower: pairs to `eva_vitg_psz14.bin`."""

from __future__ import annotations

import logging

from lavit_dist.checkpoint.official import save_vision_encoder
from lavit_dist.config.tower import TrainTowerConfig
from lavit_dist.data.pair_batches import PairBatches, PairDataset
from lavit_dist.data.pairs import list_shards
from lavit_dist.data.text_tokenizer import TextTokenizer
from lavit_dist.engine.contrastive import ContrastiveTraining
from lavit_dist.engine.loop import run_training
from lavit_dist.engine.run_folder import RunFolder
from lavit_dist.models.contrastive import ContrastiveModel
from lavit_dist.models.initialisation import initialise
from lavit_dist.models.text_encoder import TextEncoder
from lavit_dist.models.vision_encoder import VisionEncoder
from lavit_dist.observe.logs import setup_logging
from lavit_dist.observe.metrics import MetricsCallback
from lavit_dist.parallel.apex import check_apex
from lavit_dist.parallel.distributed import init_distributed, rank, seed_everything, world_size
from lavit_dist.parallel.outside_faults import outside_faults_told

logger = logging.getLogger(__name__)


def run(config: TrainTowerConfig) -> None:
    """Trains, or resumes, or says that the tower is already there; RUN_DIR/model/visual_tokenizer holds it."""
    setup_logging()
    check_apex()
    folder = RunFolder(config.run_dir)
    folder.check_config(config)
    if folder.done:
        logger.info("%s is already there", folder.model)
        return
    shards = list_shards(config.pairs)
    text_tokenizer = TextTokenizer.load(config.text_tokenizer)
    dataset = PairDataset(shards, config.encoder.image_size, max_pixels=config.max_pixels)
    batches = PairBatches(dataset, config.global_batch_size, config.seed, rank(), world_size())

    init_distributed(config.num_threads, config.faults.hang_seconds)

    folder.open(config)
    seed_everything(config.seed)
    text = TextEncoder(config.text, text_tokenizer.vocab_size, config.encoder.head_out)
    model = ContrastiveModel(VisionEncoder(config.encoder), text)
    initialise(model)
    with outside_faults_told(
        "while the model was built", advice=ContrastiveTraining.memory_advice, retry=folder.checkpoints.exists()
    ):
        training = ContrastiveTraining(config, model, text_tokenizer, batches)
    done = run_training(
        training,
        run_dir=folder.root,
        total_steps=config.total_steps,
        checkpoint=config.checkpoint,
        faults=config.faults,
        config=config,
        callbacks=[MetricsCallback(folder.root, config.logging)],
    )
    if done:
        folder.publish(lambda out: save_vision_encoder(model.vision, out))
