"""What tells weights apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and values, however they were stored."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        add_tensor(digest, name, tensors[name])
    return digest.hexdigest()


def add_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    """Adds a tensor, called `name`, to a digest of `hashlib`."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
