"""Makes a trained visual tokenizer fast: frozen layers in a chosen precision, and compiled blocks where that is asked for."""

from __future__ import annotations

import torch
from torch import nn

from lavit_dist.errors import UserError, check
from lavit_dist.models.attention import Mlp
from lavit_dist.models.frozen_linear import FrozenLinear, has_bf16_layers
from lavit_dist.models.merger import MergerBlock
from lavit_dist.models.selector import TokenSelector
from lavit_dist.models.tokenizer_decoder import QueryDecoder
from lavit_dist.models.vision_encoder import EvaAttention, EvaBlock
from lavit_dist.models.visual_tokenizer import VisualTokenizer


def freeze_for_inference(
    tokenizer: VisualTokenizer, *, dtype: torch.dtype = torch.float32, compile_blocks: bool = False
) -> VisualTokenizer:
    """Freezes `tokenizer` in place, on the device that it is on, and returns it. It can't be trained, moved, copied or saved afterwards.

    Linear and convolution layers compute in `dtype`, fp32 or bf16. Norms, residual sums, the selector, distances to codes and the
    decoders stay in fp32. In fp32 nothing but rounding changes. `compile_blocks` has torch.compile fuse what lies between the products of the
    encoder's and the merger's blocks, for any batch size; the first batches then take a minute.

    On a CPU what becomes of an image does not depend on the images beside it, bit for bit: every product sums in an order that the
    number of rows doesn't change, and each image is attended to by itself. On a GPU kernels are chosen by size, and a patch whose
    two scores, or a token whose two nearest codes, are equal within rounding may fall either way in another batch.

    Raises `UserError` for a `dtype` that the device can't compute in and where there is no compiler.
    """
    device = next(tokenizer.parameters()).device
    check(dtype in (torch.float32, torch.bfloat16), f"precision {dtype} is not one for inference; choose fp32 or bf16.")
    check(
        dtype == torch.float32 or device.type != "cpu" or has_bf16_layers(),
        "precision bf16 is set, but this CPU has no AVX-512, which it takes; choose fp32.",
    )
    if compile_blocks:
        _check_compiler(device)
    tokenizer.eval().requires_grad_(False)
    _freeze(tokenizer, dtype)
    if compile_blocks:
        for part in tokenizer.modules():
            if isinstance(part, EvaBlock):
                if device.type == "cpu":  # there it may go image by image, which a compiled block would unroll
                    part.attn.attend = torch.compiler.disable(part.attn.attend)
                part.compile(dynamic=True)
            elif isinstance(part, MergerBlock):
                part.compile_merge_kept()
    return tokenizer


def _freeze(module: nn.Module, dtype: torch.dtype) -> None:
    if isinstance(module, TokenSelector | QueryDecoder):
        dtype = torch.float32
    elif isinstance(module, EvaAttention):
        module.qkv = FrozenLinear(module.qkv.weight, module.qkv_bias, dtype)
    elif isinstance(module, Mlp):
        module.fc1 = FrozenLinear(module.fc1.weight, module.fc1.bias, dtype, "gelu")
        module.act = nn.Identity()
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, FrozenLinear(child.weight, child.bias, dtype))
        elif isinstance(child, nn.Conv2d):
            child.to(dtype)
        else:
            _freeze(child, dtype)


def _check_compiler(device: torch.device) -> None:
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except RuntimeError as error:
        lines = str(error).strip().splitlines()
        raise UserError(
            f"compile is on, but torch.compile fails on this machine ({lines[0] if lines else error!r});"
            " install a C++ compiler (such as g++), or turn compile off."
        ) from error
