"""Pretraining of the language model: an id set to a Hugging Face LLaMA that reads and writes pictures."""

from __future__ import annotations

import logging
from pathlib import Path

from lavit_dist.checkpoint.hf import export_hf
from lavit_dist.checkpoint.llama_source import llama_source
from lavit_dist.checkpoint.llama_state import check_layout
from lavit_dist.checkpoint.official import tokenizer_digest
from lavit_dist.checkpoint.store import CheckpointStore
from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.data.global_batches import GlobalBatches
from lavit_dist.data.image_tokens import mixed_tokenizer
from lavit_dist.data.manifest import load_manifest
from lavit_dist.data.rows import RowDataset
from lavit_dist.data.text_tokenizer import TextTokenizer
from lavit_dist.engine.adamw import adamw_implementation
from lavit_dist.engine.llama_parameters import frozen_names
from lavit_dist.engine.loop import run_training
from lavit_dist.engine.run_folder import RunFolder
from lavit_dist.models.transformer_engine import check_transformer_engine
from lavit_dist.models.vocabulary import Vocabulary
from lavit_dist.observe.logs import setup_logging
from lavit_dist.observe.metrics import MetricsCallback
from lavit_dist.parallel.apex import check_apex
from lavit_dist.parallel.distributed import init_distributed, rank, world_size
from lavit_dist.parallel.lean_imports import import_megatron
from lavit_dist.parallel.topology import Layout, init_model_parallel

logger = logging.getLogger(__name__)


def run(config: PretrainConfig) -> None:
    """Trains, or resumes, or says that the model is already there; RUN_DIR/model holds it."""
    setup_logging()
    check_apex()
    adamw_implementation(config.optimizer, offloaded=config.parallel.offload_optimizer)
    if config.attention == "transformer_engine":
        check_transformer_engine(config.precision)
    layout = Layout.of(config.parallel, world_size())
    layout.check_batch(config.global_batch_size, config.micro_batch_size)
    folder = RunFolder(config.run_dir)
    folder.check_config(config)
    if folder.done:
        logger.info("%s is already there", folder.model)
        return
    store = CheckpointStore(folder.checkpoints)
    if (newest := store.newest()) is not None:
        check_layout(newest.folder, layout, config.parallel.zero_stage)
    batches = open_batches(config)
    rows = batches.rows
    # A checkpoint replaces every weight that a run starts with: init_from may have moved since.
    source = llama_source(config, rows.vocabulary, rows.manifest.encoding.visual_tokenizer) if newest is None else None
    frozen_names(config.model, config.parameters.freeze)
    layout.check_vocabulary(batches.rows.vocabulary)

    init_distributed(config.num_threads)
    import_megatron()
    init_model_parallel(layout)
    from lavit_dist.engine.pretraining import Pretraining

    folder.open(config)
    run_training(
        Pretraining(config, layout, batches, source),
        total_steps=config.total_steps,
        store=store,
        checkpoint=config.checkpoint,
        callbacks=[MetricsCallback(Path(config.run_dir), config.logging)],
    )
    folder.publish(lambda out: export_hf(store.step_folder(config.total_steps), out, config.text_tokenizer))


def open_batches(config: PretrainConfig) -> GlobalBatches:
    """The training rows, after the checks that the ids are those of this run's tokenizers, and that these suit an export.

    Rank 0 makes the checks that take long.
    """
    text_tokenizer = TextTokenizer.load(config.text_tokenizer)
    manifest = load_manifest(config.ids)
    visual = tokenizer_digest(config.visual_tokenizer) if config.visual_tokenizer and rank() == 0 else None
    manifest.check_tokenizers(visual_tokenizer=visual, text_tokenizer=text_tokenizer.digest)
    vocabulary = Vocabulary(text_tokenizer.vocab_size, manifest.encoding.codebook_size)
    if rank() == 0:
        mixed_tokenizer(text_tokenizer.folder, vocabulary)  # the export makes it again: better refused now than after the last step
    rows = RowDataset(
        config.ids,
        vocabulary,
        text_tokenizer.eos_id,
        config.seq_len,
        config.seed,
        config.caption_dropout,
        config.documents,
        verify=rank() == 0,
    )
    return GlobalBatches(rows, config.global_batch_size)
