"""A straightforward implementation of the released tokenizer, against which ours is timed; and what both sides report."""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavit_dist.models.visual_tokenizer import VisualTokenizer

EPS = 1e-6
STAGES = ("tower", "selector", "merger", "quantizer")


class Tokens(NamedTuple):
    """What either side makes of a batch."""

    features: Tensor
    keep_mask: Tensor
    codes: Tensor
    vectors: Tensor


class Clock:
    """Seconds by stage: of the processor on one thread of a CPU, which other work on the machine doesn't stretch, else of the wall."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[name] += self._now() - start

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if self.device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


class Released:
    """The released computation spelled out: explicit attention, masks over all patches, distances to all codes, one-hot look-up."""

    def __init__(self, tokenizer: VisualTokenizer, dtype: torch.dtype) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        self.dtype = dtype
        for part in (self.tokenizer.encoder, self.tokenizer.merger, self.tokenizer.tokenizer_encoder.encode_task_layer):
            for layer in part.modules():
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    layer.to(dtype)

    def __call__(self, pixels: Tensor, noise: Tensor, clock: Clock) -> Tokens:
        with clock.stage("tower"):
            features = self.tower(pixels)
        with clock.stage("selector"):
            keep = F.one_hot((self.tokenizer.selector(features) + noise).argmax(-1), 2)[..., 0].float()
        with clock.stage("merger"):
            merged = self.merge(features, keep)[keep > 0]
        with clock.stage("quantizer"):
            codes, vectors = self.quantize(merged)
        return Tokens(features, keep > 0, codes, vectors)

    def tower(self, pixels: Tensor) -> Tensor:
        encoder = self.tokenizer.encoder
        patches = encoder.patch_embed.proj(pixels.to(self.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat([encoder.cls_token.expand(len(patches), -1, -1), patches.float()], dim=1) + encoder.pos_embed
        for block in encoder.blocks:
            attention = block.attn
            bias = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias]).to(self.dtype)
            qkv = F.linear(block.norm1(x).to(self.dtype), attention.qkv.weight, bias)
            query, key, value = (heads(part, attention.heads) for part in qkv.chunk(3, dim=-1))
            weights = (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(-1)
            x = x + attention.proj(together(weights @ value))
            x = x + self.mlp(block, x)
        return x[:, 1:]

    def merge(self, features: Tensor, keep: Tensor) -> Tensor:
        merger, patches = self.tokenizer.merger, features.shape[1]
        policy = keep[:, None, None, :]
        ones = torch.ones(patches, patches, device=keep.device)
        causal = (policy + (1 - policy) * torch.eye(patches, device=keep.device)) * ones.tril()
        memory = merger.ln_vision(features).to(self.dtype)
        x = features
        for block in merger.blocks:
            attention = block.token_causal_attn
            qkv = attention.qkv(block.norm0(x).to(self.dtype))
            x = x + attention.proj(self.attend(*(heads(part, attention.heads) for part in qkv.chunk(3, dim=-1)), causal))
            cross = block.token_cross_attn
            projected = cross.query(block.norm1(x).to(self.dtype)), cross.key(memory), cross.value(memory)
            x = x + cross.proj(self.attend(*(heads(part, cross.heads) for part in projected), 1 - policy))
            x = x + self.mlp(block, x)
        return merger.norm(x)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, policy: Tensor) -> Tensor:
        scores = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)
        weights = (scores - scores.amax(-1, keepdim=True)).float().exp() * policy
        weights = (weights + EPS / weights.shape[-1]) / (weights.sum(-1, keepdim=True) + EPS)
        return together(weights.to(value.dtype) @ value)

    def mlp(self, block: nn.Module, x: Tensor) -> Tensor:
        return block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x).to(self.dtype))))

    def quantize(self, merged: Tensor) -> tuple[Tensor, Tensor]:
        layers, codebook = self.tokenizer.tokenizer_encoder.encode_task_layer, self.tokenizer.quantizer.embedding.weight
        unit = F.normalize(layers(merged.to(self.dtype)).float(), dim=-1)
        distances = unit.square().sum(-1, keepdim=True) + codebook.square().sum(-1) - 2 * unit @ codebook.t()
        codes = distances.argmin(-1)
        return codes, F.one_hot(codes, len(codebook)).float() @ codebook


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def together(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)
