"""Pretraining of the language model: an id set to a Hugging Face LLaMA that reads and writes pictures."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from lavit_dist.checkpoint.hf import export_hf
from lavit_dist.checkpoint.llama_source import llama_source
from lavit_dist.checkpoint.llama_state import FACTS, read_facts
from lavit_dist.checkpoint.official import tokenizer_digest
from lavit_dist.checkpoint.store import CheckpointStore
from lavit_dist.config.mixture import SOLE_SOURCE, SourceConfig, weights_from_steps
from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.data.epoch_plan import DEFAULT_FOLDER
from lavit_dist.data.global_batches import GlobalBatches
from lavit_dist.data.hashing import stable_hash
from lavit_dist.data.image_tokens import mixed_tokenizer
from lavit_dist.data.kept_manifest import keep_manifest
from lavit_dist.data.manifest import load_manifest
from lavit_dist.data.mixed_rows import MixedRows
from lavit_dist.data.mixture import Asked
from lavit_dist.data.rows import RowDataset
from lavit_dist.data.text_tokenizer import TextTokenizer
from lavit_dist.engine.adamw import adamw_implementation
from lavit_dist.engine.llama_parameters import frozen_names
from lavit_dist.engine.loop import run_training
from lavit_dist.engine.run_folder import RunFolder
from lavit_dist.errors import check
from lavit_dist.models.transformer_engine import check_transformer_engine
from lavit_dist.models.vocabulary import Vocabulary
from lavit_dist.observe.logs import setup_logging
from lavit_dist.observe.metrics import MetricsCallback
from lavit_dist.parallel.apex import check_apex
from lavit_dist.parallel.distributed import rank, world_size
from lavit_dist.parallel.outside_faults import outside_faults_told
from lavit_dist.parallel.topology import Layout, start_model_parallel

logger = logging.getLogger(__name__)
LAYOUT_SETTINGS = ("parallel", "micro_batch_size", "activation_checkpointing", "attention", "compile")
"""What a resumed run may change, with the number of its processes: checkpoints don't depend on it."""
MIXTURE_SETTINGS = ("ids", "sources", "curriculum", "weigh_by")
"""What a resumed run may change: a checkpoint knows id sets by their fingerprints, and from which row on weights were others."""


def run(config: PretrainConfig) -> None:
    """Trains, or resumes, or says that the model is already there; RUN_DIR/model holds it."""
    setup_logging()
    check_apex()
    adamw_implementation(config.optimizer, zero_stage=config.parallel.zero_stage, offloaded=config.parallel.offload_optimizer)
    if config.attention == "transformer_engine":
        check_transformer_engine(config.precision)
    layout = Layout.of(config.parallel, world_size())
    layout.check_batch(config.global_batch_size, config.micro_batch_size)
    folder = RunFolder(config.run_dir, may_change=(*MIXTURE_SETTINGS, *LAYOUT_SETTINGS))
    folder.check_config(config)
    if folder.done:
        logger.info("%s is already there", folder.model)
        return
    store = CheckpointStore(folder.checkpoints)
    newest = store.newest([FACTS])
    batches = open_batches(config)
    rows = batches.rows
    if newest is None:
        batches.check_suffice(config.total_steps)
        rows.log_phases(0)
    else:
        facts = read_facts(newest.folder)
        check_codes(facts.codebook_size, rows.vocabulary)
        batches.check_state(facts.data, folder.data)
    # A checkpoint replaces every weight that a run starts with: init_from may have moved since.
    source = llama_source(config, rows.vocabulary, rows.encoding.visual_tokenizer) if newest is None else None
    frozen_names(config.model, config.parameters.freeze)
    layout.check_vocabulary(rows.vocabulary)

    start_model_parallel(layout, config.num_threads, config.faults.hang_seconds)
    from lavit_dist.engine.pretraining import Pretraining
    from lavit_dist.parallel.megatron_llama import no_weights

    folder.open(config)
    if rank() == 0:
        for source_rows in rows.sources.values():
            keep_manifest(folder.data, source_rows.manifest, config.id_cache.storage_options)
    with outside_faults_told("while the model was built", advice=Pretraining.memory_advice, retry=newest is not None):
        training = Pretraining(config, layout, batches, source if newest is None else no_weights)
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
        folder.publish(lambda out: export_hf(store.step_folder(config.total_steps), out, config.text_tokenizer))


def open_batches(config: PretrainConfig, *, verify: bool = True) -> GlobalBatches:
    """The training rows, after the checks that the ids are those of this run's tokenizers, and that these suit an export.

    Rank 0 makes the checks that take long; without `verify` shards are not read through to compare their sha256.
    """
    sources = config.sources or {SOLE_SOURCE: SourceConfig(ids=str(config.ids))}
    text_tokenizer = TextTokenizer.load(config.text_tokenizer)
    visual = tokenizer_digest(config.visual_tokenizer) if config.visual_tokenizer and rank() == 0 else None
    manifests = {name: load_manifest(source.ids, config.id_cache.storage_options) for name, source in sources.items()}
    for manifest in manifests.values():
        manifest.check_tokenizers(visual_tokenizer=visual, text_tokenizer=text_tokenizer.digest)
    encodings = [manifest.encoding for manifest in manifests.values()]
    check(
        config.visual_tokenizer is None or any(encoding.has_images for encoding in encodings),
        f"visual_tokenizer {config.visual_tokenizer} has no meaning here, since no source has images; leave it out, or add one that has.",
    )
    vocabulary = Vocabulary(text_tokenizer.vocab_size, max(encoding.codebook_size for encoding in encodings))
    if rank() == 0:
        mixed_tokenizer(text_tokenizer.folder, vocabulary)  # the export makes it again: better refused now than after the last step
    rows = {
        name: RowDataset(
            manifest,
            vocabulary,
            text_tokenizer.eos_id,
            config.seq_len,
            source_seed(name, config.seed),
            config.caption_dropout,
            config.documents,
            id_cache=config.id_cache,
            verify=verify and rank() == 0,
            plans=Path(config.plan_cache or DEFAULT_FOLDER).expanduser(),
        )
        for name, manifest in manifests.items()
    }
    asked = [
        Asked(step * config.global_batch_size, _row_weights(config, rows, weights))
        for step, weights in weights_from_steps(sources, config.curriculum)
    ]
    max_epochs = {name: source.max_epochs for name, source in sources.items() if source.max_epochs is not None}
    mixed = MixedRows(rows, asked, max_epochs, config.total_steps * config.global_batch_size)
    return GlobalBatches(mixed, config.global_batch_size)


def check_codes(codebook_size: int, vocabulary: Vocabulary) -> None:
    """Raises `UserError` when a checkpoint's model has another number of codes than the ids now call for."""
    check(
        codebook_size == vocabulary.codebook_size,
        f"The checkpoint's model has {codebook_size} visual codes, but the sources now have {vocabulary.codebook_size}; give sources with the"
        " codes that it was trained on (one of weight 0 is not read), or start a new run.",
    )


def source_seed(name: str, seed: int) -> int:
    """The seed of a source's order and choices: sources with documents in common then don't show them at the same time."""
    return seed if name == SOLE_SOURCE else stable_hash("source", seed, name) >> 1  # seeds are below 2**63


def _row_weights(config: PretrainConfig, rows: Mapping[str, RowDataset], weights: Mapping[str, float]) -> dict[str, float]:
    """Weights of the sources' rows."""
    if config.weigh_by == "tokens":
        return dict(weights)
    return {name: weight * rows[name].rows_before_epoch(1) / rows[name].num_documents for name, weight in weights.items()}
