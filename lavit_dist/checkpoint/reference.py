"""A folder of reference vectors: what the released modules compute with given weights, read.

FOLDER/config.json               sizes, in the words of the reference
FOLDER/visual_tokenizer/*        weights in the released layout (also language_model/visual_weight.bin)
FOLDER/vectors.safetensors       inputs and what each part makes of them
FOLDER/state_dict_keys.txt       file, key and shape of every tensor, separated by tabs; optional
FOLDER/SHA256SUMS                digests of files, as sha256sum writes them; optional
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lavit_dist.checkpoint.official import SUBFOLDER
from lavit_dist.checkpoint.tensor_file import BIN, SAFETENSORS
from lavit_dist.config.base import build
from lavit_dist.config.model import MLP_RATIO, VisualTokenizerConfig
from lavit_dist.errors import UserError, check
from lavit_dist.files import read_json, sha256

REFERENCE_SIZES = "config.json"
VECTORS = "vectors.safetensors"
KEYS = "state_dict_keys.txt"
DIGESTS = "SHA256SUMS"
RENAMED = {"lowres_out": "unet_dim", "highres_out": "highres_dims", "pooled": "pooled_dim"}
"""The reference's words for settings of the decoder."""
ListedShapes = dict[str, dict[str, tuple[int, ...]]]
"""Shapes by file name without suffix and key."""


def is_reference_folder(folder: Path) -> bool:
    """Whether `folder` is meant to be a folder of reference vectors: any of what it must hold is there."""
    return any((folder / name).exists() for name in (VECTORS, SUBFOLDER))


def reference_config(folder: Path) -> VisualTokenizerConfig:
    """The sizes in the folder's `config.json`. Raises `UserError` for a file that is missing, incomplete or contradicts itself."""
    path = folder / REFERENCE_SIZES
    check(path.is_file(), f"The file {path} is missing; it tells the sizes of the reference.")
    sizes = read_json(path, "restore it")
    encoder, merger, codebook, decoder = (_section(sizes, name, path) for name in ("encoder", "merger", "codebook", "decoder"))
    for name in ("image_size", "patch_size"):
        check(name in sizes, f"{path}: {name} is not set; give it.")
    hidden = encoder.pop("mlp_hidden", None) or int(_whole(encoder, "width", path) * encoder.get("mlp_ratio", MLP_RATIO))
    encoder.pop("mlp_ratio", None)
    merger = {"mlp_hidden": hidden, **merger}
    decoder = {RENAMED.get(key, key): value for key, value in decoder.items()}
    places = {name: sizes[name] for name in ("image_size", "patch_size")}
    values = {
        "encoder": {**encoder, **places, "mlp_hidden": hidden},
        "merger": merger,
        "codebook": codebook,
        "decoder": {"mlp_hidden": merger["mlp_hidden"], **decoder},
        "vit_proj_dim": sizes.get("llm_hidden"),
    }
    return build(VisualTokenizerConfig, values, source=str(path))


def read_vectors(folder: Path) -> dict[str, Tensor]:
    """The reference vectors by name; `UserError` when there are none."""
    path = folder / VECTORS
    check(path.is_file(), f"The file {path} is missing; it holds what the reference computed.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a safetensors file ({' '.join(str(error).split())[:120]}); restore it.") from error


def listed_shapes(folder: Path) -> ListedShapes | None:
    """The tensors that `state_dict_keys.txt` lists; None where there is no such file."""
    path = folder / KEYS
    if not path.exists():
        return None
    listed: ListedShapes = {}
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        match = re.fullmatch(r"(\S+)\t(\S+)\t\(([\d, ]*)\)", line.rstrip())
        if match is None:
            raise UserError(f"{path}: line {number} is {line[:80]!r}; it must be a file, a key and a shape, separated by tabs.")
        name, key, shape = match.groups()
        listed.setdefault(Path(name).stem, {})[key] = tuple(int(size) for size in re.findall(r"\d+", shape))
    return listed


def altered_files(folder: Path) -> list[str] | None:
    """Files that are absent, differ from their digest in `SHA256SUMS`, or hold weights that it doesn't list; None without such a file."""
    path = folder / DIGESTS
    if not path.exists():
        return None
    altered = []
    listed: set[str] = set()
    for line in path.read_text(errors="replace").splitlines():
        digest, _, name = line.partition(" ")
        name = name.lstrip(" *")
        if not name or not (folder / name).is_file() or sha256(folder / name) != digest.lower():
            altered.append(name or line[:80])
        listed.add(name)
    weights = {str(file.relative_to(folder)) for file in folder.glob("*/*") if file.suffix in (BIN, SAFETENSORS)}
    return altered + [f"{name} (not listed)" for name in sorted(weights - listed)]


def _section(sizes: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    section = sizes.get(name)
    if not isinstance(section, dict):
        raise UserError(f"{path}: {name} is {section!r}; it must hold the sizes of that part.")
    return dict(section)


def _whole(section: dict[str, Any], name: str, path: Path) -> int:
    value = section.get(name)
    if not isinstance(value, int):
        raise UserError(f"{path}: {name} is {value!r}; it must be a whole number.")
    return value
