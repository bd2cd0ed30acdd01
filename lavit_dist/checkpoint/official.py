"""The released folder layout of the visual tokenizer: its file names and key names, read and written.

FOLDER/visual_tokenizer/eva_vitg_psz14.bin               VisionEncoder
FOLDER/visual_tokenizer/tokenizer_encoder.bin            selector, merger, quantizer
FOLDER/visual_tokenizer/tokenizer_decoder.bin            decoder for Stable Diffusion 1.5 shapes
FOLDER/visual_tokenizer/highres_tokenizer_decoder.bin    decoder for SDXL shapes, optional
FOLDER/visual_tokenizer/config.json                      sizes (ours; the release has one size, the defaults)
FOLDER/language_model/visual_weight.bin                  the merger that was trained with the language model, and vit_proj; optional

Our own form has `.safetensors` in place of `.bin`, with the same keys. Files may be of any floating-point type. A
`tokenizer_encoder.bin` may hold `vit_proj` too; without `visual_weight.bin` its merger then serves both ends.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lavit_dist.checkpoint.digests import add_tensor
from lavit_dist.checkpoint.module_weights import check_keys, load_weights
from lavit_dist.checkpoint.tensor_file import BIN, SAFETENSORS, TensorFile, write_tensors
from lavit_dist.config.base import build, to_dict
from lavit_dist.config.model import VisionEncoderConfig, VisualTokenizerConfig
from lavit_dist.errors import UserError, check
from lavit_dist.files import read_json, write_atomically
from lavit_dist.models.tokenizer_decoder import HighResolutionTokenizerDecoder
from lavit_dist.models.vision_encoder import VisionEncoder
from lavit_dist.models.visual_tokenizer import UnderstandingEncoder, VisualTokenizer

logger = logging.getLogger(__name__)
Form = Literal["official", "safetensors"]
SUFFIXES: dict[Form, str] = {"official": BIN, "safetensors": SAFETENSORS}

SUBFOLDER = "visual_tokenizer"
ENCODER = f"{SUBFOLDER}/eva_vitg_psz14"
TOKENIZER_ENCODER = f"{SUBFOLDER}/tokenizer_encoder"
DECODER = f"{SUBFOLDER}/tokenizer_decoder"
HIGHRES_DECODER = f"{SUBFOLDER}/highres_tokenizer_decoder"
UNDERSTANDING = "language_model/visual_weight"
REQUIRED = (ENCODER, TOKENIZER_ENCODER, DECODER)
OPTIONAL = (HIGHRES_DECODER, UNDERSTANDING)
SIZES = f"{SUBFOLDER}/config.json"
PROJECTION = "vit_proj."
CODEBOOK = "quantize.embedding.weight"
OTHER_TOWERS = "; correct encoder.* if its sizes are others, or convert another layout by `python launcher/convert.py tower`"


class Part(NamedTuple):
    """One module of a tokenizer and the file that holds its weights."""

    stem: str
    """Path of the module's own file in a folder of the released layout, without suffix."""
    module: nn.Module
    file: TensorFile


class OpenedTokenizer(NamedTuple):
    """A tokenizer whose weights are still in their files."""

    tokenizer: VisualTokenizer
    """On the meta device."""
    parts: list[Part]


def load_visual_tokenizer(
    folder: str | Path, dtype: torch.dtype = torch.float32, config: VisualTokenizerConfig | None = None
) -> VisualTokenizer:
    """The tokenizer in `folder`, frozen and in evaluation mode; `UserError` names a missing file or key.

    `dtype` is that of linear and convolution layers, all else is fp32: below fp32, run it under `torch.autocast`. `config`
    stands in for the sizes that the folder tells.
    """
    opened = open_visual_tokenizer(folder, config)
    check_parts(opened.parts)
    return read_opened(opened, dtype)


def save_visual_tokenizer(
    tokenizer: VisualTokenizer, folder: str | Path, form: Form = "official", dtype: torch.dtype | None = None
) -> None:
    """Writes what `load_visual_tokenizer` reads; `dtype` (bf16 in the release) converts every tensor."""
    states: dict[str, Mapping[str, Tensor]] = {
        ENCODER: tokenizer.encoder.state_dict(),
        TOKENIZER_ENCODER: tokenizer.tokenizer_encoder.state_dict(),
        DECODER: tokenizer.decoder.state_dict(),
    }
    if tokenizer.highres_decoder is not None:
        states[HIGHRES_DECODER] = tokenizer.highres_decoder.state_dict()
    if tokenizer.understanding is not None:
        states[UNDERSTANDING] = tokenizer.understanding.state_dict()
    _write(Path(folder), states.keys(), states.items(), tokenizer.config, form, dtype)


def convert_visual_tokenizer(source: str | Path, destination: str | Path, form: Form, dtype: torch.dtype | None = None) -> None:
    """Writes the tokenizer in `source` in another form or type, file by file, without building it."""
    tokenizer, parts = open_visual_tokenizer(source)
    check_parts(parts)
    for part in parts:
        part.file.check_intact()
    states = ((part.stem, dict(part.file.read(part.module.state_dict()))) for part in parts)
    _write(Path(destination), {part.stem for part in parts}, states, tokenizer.config, form, dtype)


def load_vision_encoder(folder: str | Path, config: VisionEncoderConfig, dtype: torch.dtype = torch.float32) -> VisionEncoder:
    """The frozen tower alone, of the sizes in `config`; `folder` need not hold the rest of a tokenizer."""
    with torch.device("meta"):
        encoder = VisionEncoder(config)
    part = Part(ENCODER, encoder, open_file(Path(folder), ENCODER))
    check_parts([part])
    load_weights(encoder, part.file, dtype)
    return encoder.eval().requires_grad_(False)


def load_codebook(folder: str | Path) -> Tensor:
    """The codes [code, channel] of the tokenizer in `folder`, fp32, without the rest of it."""
    file = open_file(Path(folder), TOKENIZER_ENCODER)
    check(CODEBOOK in file.headers, f"{file.path} holds no {CODEBOOK}; replace the file.")
    return file.read_rows(CODEBOOK).float()


def save_vision_encoder(
    encoder: VisionEncoder, folder: str | Path, form: Form = "official", dtype: torch.dtype | None = None
) -> None:
    """Writes what `load_vision_encoder` reads."""
    write_vision_encoder(encoder.state_dict(), folder, form, dtype)


def write_vision_encoder(
    state: Mapping[str, Tensor], folder: str | Path, form: Form = "official", dtype: torch.dtype | None = None
) -> None:
    """The same of a tower's tensors by their released names."""
    write_tensors(Path(folder) / (ENCODER + SUFFIXES[form]), state, dtype)


def tokenizer_digest(folder: str | Path) -> str:
    """sha256 over what decides an image's codes: tower, selector, merger and quantizer, and the sizes that weights don't tell.

    The same weights have the same digest in every form. Decoders don't count, nor does what the language model reads: training
    them leaves the codes as they are.
    """
    config = to_dict(visual_tokenizer_config(folder))
    return _digest(Path(folder), (ENCODER, TOKENIZER_ENCODER), {part: config[part] for part in ("encoder", "merger")})


def vision_encoder_digest(folder: str | Path, config: VisionEncoderConfig) -> str:
    """sha256 over what decides an image's features: the tower's weights and sizes."""
    return _digest(Path(folder), (ENCODER,), to_dict(config))


def _digest(folder: Path, stems: Iterable[str], sizes: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for stem in stems:
        file = open_file(folder, stem)
        for key, tensor in file.read(sorted(key for key in file.headers if not key.startswith(PROJECTION))):
            add_tensor(digest, f"{stem} {key}", tensor)
    digest.update(json.dumps(sizes, sort_keys=True).encode())
    return digest.hexdigest()


def visual_tokenizer_config(folder: str | Path) -> VisualTokenizerConfig:
    """The sizes of the tokenizer in `folder`, without its weights; those of the release where the folder doesn't tell."""
    _check_folder(Path(folder))
    path = Path(folder) / SIZES
    if not path.exists():
        return VisualTokenizerConfig()
    return build(VisualTokenizerConfig, read_json(path, "restore it, or remove it for the sizes of the release"), source=str(path))


def open_visual_tokenizer(folder: str | Path, config: VisualTokenizerConfig | None = None) -> OpenedTokenizer:
    """The modules that `folder` has files for, and those files, none of which is read yet. Raises `UserError` for a missing file."""
    folder = Path(folder)
    config = config or visual_tokenizer_config(folder)
    files = {stem: open_file(folder, stem) for stem in REQUIRED}
    files |= {stem: open_file(folder, stem) for stem in OPTIONAL if find_file(folder, stem)}
    if holds_projection(files[TOKENIZER_ENCODER]):
        if UNDERSTANDING in files:
            logger.warning(
                "%s holds %s* too; those of %s count", files[TOKENIZER_ENCODER].path, PROJECTION, files[UNDERSTANDING].path
            )
        else:
            files[UNDERSTANDING] = files[TOKENIZER_ENCODER]
    config = _with_projection(config, files.get(UNDERSTANDING))
    with torch.device("meta"):
        tokenizer = VisualTokenizer(config)
        tokenizer.highres_decoder = HighResolutionTokenizerDecoder(config) if HIGHRES_DECODER in files else None
    modules = {
        ENCODER: tokenizer.encoder,
        TOKENIZER_ENCODER: tokenizer.tokenizer_encoder,
        DECODER: tokenizer.decoder,
        HIGHRES_DECODER: tokenizer.highres_decoder,
        UNDERSTANDING: tokenizer.understanding,
    }
    return OpenedTokenizer(tokenizer, [Part(stem, module, files[stem]) for stem, module in modules.items() if module is not None])


def read_opened(opened: OpenedTokenizer, dtype: torch.dtype = torch.float32) -> VisualTokenizer:
    """The tokenizer with the weights of its files, which must have been checked; see `load_visual_tokenizer`."""
    for part in opened.parts:
        load_weights(part.module, part.file, dtype)
    return opened.tokenizer.eval().requires_grad_(False)


def check_parts(parts: list[Part]) -> None:
    """Raises `UserError` unless each file holds exactly the tensors of its modules; it names what is missing, extra or misshapen."""
    for file in {id(part.file): part.file for part in parts}.values():
        check_keys(file, wanted_tensors(file, parts), OTHER_TOWERS if file.path.stem == Path(ENCODER).name else "")


def wanted_tensors(file: TensorFile, parts: list[Part]) -> dict[str, Tensor]:
    """What `file` must hold: the tensors of the modules that it is for, and a `vit_proj` that a tokenizer_encoder may bring along."""
    wanted: dict[str, Tensor] = {}
    for part in parts:
        state = part.module.state_dict()
        if part.file is file:
            wanted |= state
        elif isinstance(part.module, UnderstandingEncoder) and holds_projection(file):
            wanted |= {key: tensor for key, tensor in state.items() if key.startswith(PROJECTION)}
    return wanted


def holds_projection(file: TensorFile) -> bool:
    """Whether any tensor of `file` belongs to `vit_proj`."""
    return any(key.startswith(PROJECTION) for key in file.headers)


def open_file(folder: Path, stem: str) -> TensorFile:
    """The file of one module in either form; `UserError` when it is missing or there twice."""
    _check_folder(folder)
    path = find_file(folder, stem)
    if path is None:
        names = ", ".join(Path(stem).name + BIN for stem in REQUIRED)
        raise UserError(
            f"The file {folder / (stem + BIN)} is missing (or {SAFETENSORS} in place of {BIN}); a visual tokenizer's folder holds {names}."
        )
    return TensorFile(path)


def find_file(folder: Path, stem: str) -> Path | None:
    """The path of one module's file in either form, or None; `UserError` when there are both."""
    found = [path for suffix in SUFFIXES.values() if (path := folder / (stem + suffix)).exists()]
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1].name} are both there, and only one can be meant; remove one of them.")
    return found[0] if found else None


def _with_projection(config: VisualTokenizerConfig, file: TensorFile | None) -> VisualTokenizerConfig:
    """`config` with the width of `vit_proj` in `file`: the released sizes don't tell whether a folder holds one."""
    if file is None:
        check(
            config.vit_proj_dim is None,
            f"vit_proj_dim is {config.vit_proj_dim}, but no file holds vit_proj; add {UNDERSTANDING}{BIN}, or set vit_proj_dim to null"
            f" in {SIZES}.",
        )
        return config
    header = file.headers.get(PROJECTION + "weight")
    if header is None or len(header.shape) != 2:
        raise UserError(f"{file.path} doesn't fit this model: missing keys {PROJECTION}weight; replace the file.")
    return config if config.vit_proj_dim else dataclasses.replace(config, vit_proj_dim=header.shape[0])


def _write(
    folder: Path,
    stems: Collection[str],
    states: Iterable[tuple[str, Mapping[str, Tensor]]],
    config: VisualTokenizerConfig,
    form: Form,
    dtype: torch.dtype | None,
) -> None:
    """Writes `states`, one file after another; `stems` are the files that they will make."""
    for stem in (*REQUIRED, *OPTIONAL):
        for suffix in SUFFIXES.values():
            stale = folder / (stem + suffix)
            check(
                not stale.exists() or (stem in stems and suffix == SUFFIXES[form]),
                f"{stale} is of another tokenizer than the one to be written beside it; remove it, or choose another folder.",
            )
    for stem, state in states:
        write_tensors(folder / (stem + SUFFIXES[form]), state, dtype)
    write_atomically(folder / SIZES, json.dumps(to_dict(config), indent=1).encode())


def _check_folder(folder: Path) -> None:
    check(
        (folder / SUBFOLDER).is_dir(),
        f"{folder} holds no visual tokenizer: it has no folder {SUBFOLDER}; name the folder that holds it.",
    )
