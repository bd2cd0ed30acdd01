"""Keeping PyTorch's compiler out of processes that never compile. On CPUs its import costs seconds of every start.

megatron-core and DeepSpeed hand functions to `torch.compile` while they are imported, and every `torch.optim` optimizer marks its
methods as not to be compiled, and its step as one to be compiled in parts, by way of the compiler. All three load all of it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def import_deepspeed() -> None:
    """Imports DeepSpeed and torch's optimizers; without CUDA, uncompiled."""
    with _uncompiled():
        import deepspeed
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    if not torch.cuda.is_available():
        for method in vars(torch.optim.Optimizer).values():
            plain = getattr(method, "__wrapped__", None)
            if plain is not None:
                plain.__dynamo_disable = plain  # where torch._compile caches the marked function
        if not hasattr(torch.optim.AdamW.step, "hooked"):  # torch wraps it once more when the first optimizer is made
            torch.optim.AdamW.step = _uncompiled_step(torch.optim.AdamW.step.__wrapped__)  # type: ignore[attr-defined, method-assign]


def import_megatron() -> None:
    """Imports what of megatron-core a transformer layer needs; every module that names megatron is imported after this.

    Without CUDA, `torch.cuda.current_device()`, which it uses as a `device=` argument alone, names the CPU.
    """
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    with warnings.catch_warnings(), _uncompiled():
        warnings.simplefilter("ignore")  # it says four times that apex and Transformer Engine are absent
        import megatron.core.tensor_parallel
        import megatron.core.transformer.transformer_layer  # noqa: F401


def _uncompiled_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """An optimizer's step with gradients on or off as torch sets them, without telling the compiler."""

    @functools.wraps(step)
    def update(self: torch.optim.Optimizer, *arguments: Any, **named: Any) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step(self, *arguments, **named)

    return update


@contextmanager
def _uncompiled() -> Iterator[None]:
    if torch.cuda.is_available():
        yield
        return
    compiler = torch.compile
    torch.compile = _leave  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler


def _leave(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
    return function if function is not None else _leave
