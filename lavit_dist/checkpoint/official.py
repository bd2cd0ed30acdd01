"""The released folder layout of the visual tokenizer: its file names and key names, read and written.

FOLDER/visual_tokenizer/eva_vitg_psz14.bin               VisionEncoder
FOLDER/visual_tokenizer/tokenizer_encoder.bin            selector, merger, quantizer
FOLDER/visual_tokenizer/tokenizer_decoder.bin            decoder for Stable Diffusion 1.5 shapes
FOLDER/visual_tokenizer/highres_tokenizer_decoder.bin    decoder for SDXL shapes, optional
FOLDER/visual_tokenizer/config.json                      sizes (ours; the release has one size, the defaults)
"""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import torch
from torch import nn

from lavit_dist.config.base import build, to_dict
from lavit_dist.config.model import VisionEncoderConfig, VisualTokenizerConfig
from lavit_dist.errors import UserError
from lavit_dist.files import sha256
from lavit_dist.models.tokenizer_decoder import HighResolutionTokenizerDecoder
from lavit_dist.models.vision_encoder import VisionEncoder
from lavit_dist.models.visual_tokenizer import VisualTokenizer

SUBFOLDER = "visual_tokenizer"
ENCODER = "eva_vitg_psz14.bin"
TOKENIZER_ENCODER = "tokenizer_encoder.bin"
DECODER = "tokenizer_decoder.bin"
HIGHRES_DECODER = "highres_tokenizer_decoder.bin"
SIZES = "config.json"


def load_visual_tokenizer(folder: str | Path) -> VisualTokenizer:
    """The tokenizer in `folder`, frozen and in evaluation mode; `UserError` names a missing file or key."""
    folder = _subfolder(folder)
    config = _read_config(folder)
    tokenizer = VisualTokenizer(config)
    load_into(tokenizer.encoder, folder / ENCODER)
    load_into(tokenizer.tokenizer_encoder, folder / TOKENIZER_ENCODER)
    load_into(tokenizer.decoder, folder / DECODER)
    if (folder / HIGHRES_DECODER).exists():
        tokenizer.highres_decoder = HighResolutionTokenizerDecoder(config)
        load_into(tokenizer.highres_decoder, folder / HIGHRES_DECODER)
    return tokenizer.eval().requires_grad_(False)


def save_visual_tokenizer(tokenizer: VisualTokenizer, folder: Path) -> None:
    """Writes what `load_visual_tokenizer` reads."""
    folder = folder / SUBFOLDER
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tokenizer.encoder.state_dict(), folder / ENCODER)
    torch.save(tokenizer.tokenizer_encoder.state_dict(), folder / TOKENIZER_ENCODER)
    torch.save(tokenizer.decoder.state_dict(), folder / DECODER)
    if tokenizer.highres_decoder is not None:
        torch.save(tokenizer.highres_decoder.state_dict(), folder / HIGHRES_DECODER)
    (folder / SIZES).write_text(json.dumps(to_dict(tokenizer.config), indent=1))


def load_vision_encoder(folder: str | Path, config: VisionEncoderConfig) -> VisionEncoder:
    """The frozen tower alone, of the sizes in `config`; `folder` need not hold the rest of a tokenizer."""
    encoder = VisionEncoder(config)
    load_into(encoder, _subfolder(folder) / ENCODER)
    return encoder.eval().requires_grad_(False)


def save_vision_encoder(encoder: VisionEncoder, folder: Path) -> None:
    """Writes what `load_vision_encoder` reads."""
    (folder / SUBFOLDER).mkdir(parents=True, exist_ok=True)
    torch.save(encoder.state_dict(), folder / SUBFOLDER / ENCODER)


def tokenizer_digest(folder: str | Path) -> str:
    """sha256 over what decides an image's codes: the tower, the selector, merger and quantizer, and their sizes.

    Decoders don't count: training one leaves the codes as they are.
    """
    folder = _subfolder(folder)
    digest = hashlib.sha256()
    for name in (ENCODER, TOKENIZER_ENCODER):
        _require(folder / name)
        digest.update(f"{name} {sha256(folder / name)}\n".encode())
    config = to_dict(_read_config(folder))
    digest.update(json.dumps({part: config[part] for part in ("encoder", "merger", "codebook")}, sort_keys=True).encode())
    return digest.hexdigest()


def visual_tokenizer_config(folder: str | Path) -> VisualTokenizerConfig:
    """The sizes of the tokenizer in `folder`, without its weights."""
    return _read_config(_subfolder(folder))


def load_into(module: nn.Module, path: Path) -> None:
    """Loads a `.bin` file of tensors (never of code) into `module`; `UserError` names keys that are missing, extra or misshapen."""
    _require(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} is not a file of plain tensors ({' '.join(str(error).split())[:120]}); replace it.") from error
    wanted = module.state_dict()
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or extra:
        raise UserError(f"{path} doesn't fit this model: missing keys {_some(missing)}, extra keys {_some(extra)}.")
    for key, tensor in wanted.items():
        if tensor.shape != state[key].shape:
            raise UserError(
                f"{path}: {key} has shape {tuple(state[key].shape)}, but the model has {tuple(tensor.shape)}; correct the sizes."
            )
    module.load_state_dict(state)


def _subfolder(folder: str | Path) -> Path:
    inner = Path(folder) / SUBFOLDER
    if not inner.is_dir():
        raise UserError(f"{folder} holds no visual tokenizer: it has no folder {SUBFOLDER}; name the folder that holds it.")
    return inner


def _read_config(folder: Path) -> VisualTokenizerConfig:
    path = folder / SIZES
    return (
        build(VisualTokenizerConfig, json.loads(path.read_text()), source=str(path)) if path.exists() else VisualTokenizerConfig()
    )


def _require(path: Path) -> None:
    if not path.exists():
        raise UserError(
            f"The file {path} is missing; a visual tokenizer's folder holds {ENCODER}, {TOKENIZER_ENCODER} and {DECODER}."
        )


def _some(keys: list[str]) -> str:
    return "none" if not keys else ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
