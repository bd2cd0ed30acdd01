"""Text tokenizer training: the captions of a pair set to a byte-level BPE in RUN_DIR, as a Hugging Face folder."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

from lavit_dist.config.text_tokenizer import TrainTextTokenizerConfig
from lavit_dist.data.pairs import read_pairs
from lavit_dist.data.splits import list_splits
from lavit_dist.data.text_tokenizer import FAST_FILE, train_text_tokenizer
from lavit_dist.engine.run_folder import RunFolder
from lavit_dist.errors import check
from lavit_dist.observe.logs import setup_logging

logger = logging.getLogger(__name__)


def run(config: TrainTextTokenizerConfig) -> None:
    """Trains the tokenizer, or says that it is already there."""
    setup_logging()
    folder = RunFolder(config.run_dir)
    folder.check_config(config)
    if (folder.root / FAST_FILE).exists():
        logger.info("%s is already there", folder.root / FAST_FILE)
        return
    shards = next(iter(list_splits(config.pairs, {}).values()))
    check(
        all(shard.file_system is None for shard in shards),
        f"pairs {config.pairs} must be on a local disk; copy some of its tars there.",
    )
    pairs = itertools.chain.from_iterable(read_pairs(Path(shard.path))[0] for shard in shards)
    captions = [caption for pair in pairs for caption in pair.captions]
    check(bool(captions), f"The tars of {config.pairs} hold no usable caption; see the quarantine files beside them.")
    folder.open(config)
    tokenizer = train_text_tokenizer(captions, config.vocab_size, folder.root, lower_case=config.lower_case)
    ids = sum(len(tokenizer.encode(caption)) for caption in captions)
    logger.info(
        "wrote %s: %d ids; the %d captions have %.1f on average",
        folder.root,
        tokenizer.vocab_size,
        len(captions),
        ids / len(captions),
    )
