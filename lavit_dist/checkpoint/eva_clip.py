"""EVA-CLIP's vision tower from the layouts that people have, under the names of the released `eva_vitg_psz14.bin`.

Known are the tower by itself (LaVIT's file, LAVIS's `eva_vit_g.pth`), BAAI's whole CLIP (`visual.*` beside the text tower, maybe
wrapped as `module`, `model` or `state_dict`), timm's `eva_giant_patch14_*` (a fused bias or three, `fc_norm` for `norm`) and
open_clip's (`visual.trunk.*`, or a `visual.head.proj` outside the trunk).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lavit_dist.checkpoint.module_weights import some
from lavit_dist.checkpoint.tensor_file import TensorFile
from lavit_dist.config.model import VisionEncoderConfig
from lavit_dist.errors import UserError, check
from lavit_dist.models.vision_encoder import VisionEncoder

WRAPPERS = ("model_ema", "model", "module", "state_dict")
PREFIXES = ("visual.trunk.", "visual.", "")
ANCHOR = "patch_embed.proj.weight"
POOLED = {"fc_norm": "norm", "head.proj": "head"}
"""timm's norm after pooling, and open_clip's projection outside the trunk, by the released names."""
UNUSED = re.compile(r"(mask_token|lm_head\..*|.*\.attn\.k_bias|.*\.attn\.k_proj\.bias|.*\.relative_position_index)$")
"""Tensors without effect on features: of masked pretraining, and key biases, which add the same to all scores of a softmax."""
POOL_ONLY = ("norm.weight", "norm.bias", "head.weight", "head.bias")
"""Tensors that make CLIP's embedding; patch features, which is all that the tokenizer reads, don't depend on them."""


def read_eva_clip(
    path: Path, config: VisionEncoderConfig, *, interpolate_positions: bool = False, fill_missing_head: bool = False
) -> dict[str, Tensor]:
    """The tensors of the tower in `path`, by their released names, in the file's own types.

    Raises `UserError` where the file is of another architecture or other sizes than `config`. `interpolate_positions` resamples
    the position table of another image size; `fill_missing_head` makes up for a `norm` or `head` that the file lacks by ones and
    zeros, with which the tower has features but no contrastive embedding.
    """
    file = TensorFile(path, wrappers=WRAPPERS)
    file.check_intact()
    tower = _without_prefix(file)
    with torch.device("meta"):
        wanted = VisionEncoder(config).state_dict()
    state = dict(_renamed(file, tower))
    _resize_positions(state, config, path, interpolate_positions)
    if "head.weight" in state:
        state.setdefault("head.bias", torch.zeros(len(state["head.weight"])))  # open_clip's projection has none
    missing_head = [key for key in POOL_ONLY if key not in state]
    if missing_head and fill_missing_head:
        state |= {key: (torch.ones if key == "norm.weight" else torch.zeros)(wanted[key].shape) for key in missing_head}
    elif missing_head and not wanted.keys() - state.keys() - set(POOL_ONLY):
        raise UserError(
            f"{path} holds no {some(missing_head)}; the tokenizer doesn't use them, so set fill_missing_head=true"
            " for a tower without contrastive embeddings, or convert a file that has them."
        )
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    check(
        not missing and not extra,
        f"{path} is not an EVA-CLIP tower of these sizes: missing {some(missing)}, extra {some(extra)};"
        " name a file of that architecture, or correct encoder.layers.",
    )
    for key, tensor in wanted.items():
        check(
            state[key].shape == tensor.shape,
            f"{path}: {key} has shape {tuple(state[key].shape)}, but the settings of encoder ask for {tuple(tensor.shape)};"
            " correct them.",
        )
    return {key: state[key] for key in wanted}


def _without_prefix(file: TensorFile) -> dict[str, str]:
    """The tower's names and the file's names for them; a distributed training's `module.` before all names is no matter."""
    names = {key.removeprefix("module."): key for key in file.headers}
    for prefix in PREFIXES:
        if prefix + ANCHOR in names:
            tower = {name.removeprefix(prefix): key for name, key in names.items() if name.startswith(prefix)}
            if prefix == "visual.trunk.":  # beside the trunk may stand the projection
                tower |= {name.removeprefix("visual."): key for name, key in names.items() if name.startswith("visual.head.")}
            return tower
    raise UserError(
        f"{file.path} holds no EVA-CLIP tower: it has no {ANCHOR}, visual.{ANCHOR} or visual.trunk.{ANCHOR}, but {some(file.headers)};"
        " name a file of LaVIT's, BAAI's, timm's or open_clip's."
    )


def _renamed(file: TensorFile, tower: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the tower as released: one `qkv.weight` without bias, and biases of queries and of values."""
    both_norms = {"norm.weight", "fc_norm.weight"} <= tower.keys()
    check(not both_norms, f"{file.path} has both norm and fc_norm, which the released tower can't hold; convert a CLIP tower.")
    source = {name: tensor for name, tensor in _read(file, tower) if not UNUSED.match(name)}
    for name, tensor in source.items():
        module, _, last = name.rpartition(".")
        block = module.rpartition(".")[0]
        if name.endswith("attn.qkv.bias"):
            query, _, value = tensor.chunk(3)
            yield f"{block}.q_bias", query
            yield f"{block}.v_bias", value
        elif name.endswith("attn.q_proj.weight"):
            parts = [source.get(f"{block}.{part}_proj.weight") for part in "qkv"]
            yield f"{block}.qkv.weight", torch.cat([part for part in parts if part is not None])
        elif name.endswith(("attn.k_proj.weight", "attn.v_proj.weight")):
            continue
        elif name.endswith(("attn.q_proj.bias", "attn.v_proj.bias")):
            yield f"{block}.{module[-6]}_bias", tensor
        else:
            yield f"{POOLED.get(module, module)}.{last}" if module else name, tensor


def _read(file: TensorFile, tower: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    names = {key: name for name, key in tower.items()}
    for key, tensor in file.read(names):
        check(file.headers[key].dtype is not None or UNUSED.match(names[key]) is not None, f"{file.path}: {key} holds no floats.")
        yield names[key], tensor


def _resize_positions(state: dict[str, Tensor], config: VisionEncoderConfig, path: Path, interpolate: bool) -> None:
    """Resamples the position table [1, 1 + patch, width] to the grid of `config`, bicubically; the class token's stays."""
    table = state.get("pos_embed")
    if table is None or table.dim() != 3 or table.shape[1] == config.num_patches + 1:
        return
    side = math.isqrt(table.shape[1] - 1)
    check(
        side**2 + 1 == table.shape[1],
        f"{path}: pos_embed has {table.shape[1]} positions, which is no square grid and a class token; convert another file.",
    )
    check(
        interpolate,
        f"{path}: pos_embed is that of images of {side * config.patch_size} pixels, but encoder.image_size is {config.image_size};"
        " set interpolate_positions=true to resample it, or encoder.image_size to that.",
    )
    grid = table[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=(config.grid, config.grid), mode="bicubic", antialias=True, align_corners=False)
    state["pos_embed"] = torch.cat([table[:, :1], resized.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)
