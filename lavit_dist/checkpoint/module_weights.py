"""A module's weights from a file of tensors: strict in keys and shapes, and never twice in memory.

Modules are built on the meta device, where they have sizes but no memory, and take each tensor as it is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lavit_dist.checkpoint.tensor_file import TensorFile
from lavit_dist.errors import UserError, check
from lavit_dist.models.selector import TokenSelector


def check_keys(file: TensorFile, wanted: Mapping[str, Tensor], remedy: str = "") -> None:
    """Raises `UserError` unless `file` holds exactly the tensors of `wanted`; it names keys that are missing, extra or misshapen."""
    missing, extra = sorted(wanted.keys() - file.headers.keys()), sorted(file.headers.keys() - wanted.keys())
    if missing or extra:
        raise UserError(f"{file.path} doesn't fit this model: missing keys {some(missing)}, extra keys {some(extra)}{remedy}.")
    for key, tensor in wanted.items():
        header = file.headers[key]
        if header.shape != tuple(tensor.shape):
            raise UserError(
                f"{file.path}: {key} has shape {header.shape}, but the model has {tuple(tensor.shape)}; correct the sizes."
            )
        if header.dtype is None:
            raise UserError(f"{file.path}: {key} holds no floating-point numbers; replace the file.")


def load_weights(module: nn.Module, file: TensorFile, dtype: torch.dtype, prefix: str = "") -> None:
    """Gives `module` the tensors of `file` whose names begin with `prefix`, converted one by one.

    `dtype` is that of linear and convolution layers; all else (norms, embeddings, codes) is fp32, as in the released code, and so is
    the selector, which computes in fp32. The keys must have been checked.
    """
    exact = {id(layer) for part in module.modules() if isinstance(part, TokenSelector) for layer in part.modules()}
    low = {
        f"{name}.{parameter}" if name else parameter
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear | nn.Conv2d) and id(part) not in exact
        for parameter, _ in part.named_parameters(recurse=False)
    }
    loaded = {}
    for key, tensor in file.read(prefix + key for key in module.state_dict()):
        name = key.removeprefix(prefix)
        check(bool(tensor.isfinite().all()), f"{file.path} holds numbers that are not finite in {key}; restore the file.")
        loaded[name] = torch.empty(tensor.shape, dtype=dtype if name in low else torch.float32).copy_(tensor)
    module.load_state_dict(loaded, assign=True)
    _materialise_buffers(module)


def _materialise_buffers(module: nn.Module) -> None:
    """Zeros for the buffers that files don't hold, which is what the tokenizer's training state starts from."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(part, name, torch.zeros_like(buffer, device="cpu"))


def some(keys: Iterable[str]) -> str:
    """The first keys and how many more there are, for a message."""
    keys = list(keys)
    return "none" if not keys else ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
