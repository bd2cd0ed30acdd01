"""Conversion of weights: EVA-CLIP towers of other layouts to the released one, and a tokenizer's folder to another form or type."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from lavit_dist.checkpoint.eva_clip import read_eva_clip
from lavit_dist.checkpoint.official import ENCODER, OPTIONAL, REQUIRED, convert_visual_tokenizer, find_file, write_vision_encoder
from lavit_dist.config.convert import ConvertTokenizerConfig, ConvertTowerConfig
from lavit_dist.errors import UserError, check
from lavit_dist.observe.logs import setup_logging

logger = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def tower(config: ConvertTowerConfig, source: str, destination: str) -> None:
    """Writes DESTINATION/visual_tokenizer/eva_vitg_psz14.* from the file SOURCE of an EVA-CLIP model."""
    setup_logging()
    check(Path(source).is_file(), f"{source} is no file; name a file of EVA-CLIP weights.")
    _check_free(destination)
    try:
        state = read_eva_clip(
            Path(source),
            config.encoder,
            interpolate_positions=config.interpolate_positions,
            fill_missing_head=config.fill_missing_head,
        )
    except (RuntimeError, ValueError, IndexError) as error:  # tensors of shapes that no tower has
        raise UserError(f"{source} holds tensors of shapes that no EVA-CLIP tower has ({error}); name another file.") from error
    write_vision_encoder(state, destination, config.form, DTYPES[config.dtype] if config.dtype else None)
    logger.info("wrote %s", find_file(Path(destination), ENCODER))


def tokenizer(config: ConvertTokenizerConfig, source: str, destination: str) -> None:
    """Writes the tokenizer in the folder SOURCE to the folder DESTINATION."""
    setup_logging()
    _check_free(destination)
    convert_visual_tokenizer(source, destination, config.form, DTYPES[config.dtype] if config.dtype else None)
    logger.info("wrote %s", destination)


def _check_free(destination: str) -> None:
    check(bool(destination), "DESTINATION is empty; name a folder.")
    for stem in (*REQUIRED, *OPTIONAL):
        there = find_file(Path(destination), stem)
        check(there is None, f"{there} is there already; name another folder, or remove it.")
