"""What this code computes for the inputs of a set of reference vectors, and how far that is from what the reference computed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lavit_dist.models.visual_tokenizer import VisualTokenizer

LIMIT = 1e-5
"""Largest difference from a reference tensor, relative to the largest of its values."""
PIXELS, NOISE = "pixel_values", "gumbel_noise"
CONTINUOUS = "continuous_llm_embeddings"
HIGHRES = ("decoder_highres_prompt", "decoder_highres_pooled")
SHIFTED_IDS = re.compile(r"code_ids_plus_(\d+)")
"""Ids are listed as the language model has them, after the text's."""
DEFAULT_IDS = "code_ids_plus_32002"


class Row(NamedTuple):
    """One thing that was compared."""

    name: str
    """A tensor or a file."""
    reference: str
    """The reference's shape, or how much of a file was checked."""
    measured: str
    """The largest relative difference, the share that is equal, or what is wrong."""
    limit: str
    ok: bool


def compare_vectors(tokenizer: VisualTokenizer, vectors: Mapping[str, Tensor]) -> Iterator[Row]:
    """A row per reference tensor, from the pixels on: each part reads what the part before it made here, not the reference's."""
    inputs = list(_input_rows(tokenizer, vectors))
    yield from inputs
    ready = all(row.ok for row in inputs)
    outputs = dict(compute(tokenizer, vectors[PIXELS], vectors[NOISE], ids_name(vectors))) if ready else {}
    for name in expected_names(tokenizer, vectors):
        if name not in vectors:
            yield wrong(name, "missing from the vectors")
        elif name not in outputs:
            yield Row(name, shape(vectors[name]), "not computed", "", False)
        else:
            yield compare(name, outputs[name], vectors[name])
    if ready:
        yield from _kept_rows(tokenizer, outputs, vectors[NOISE], ids_name(vectors))


@torch.no_grad()
def compute(tokenizer: VisualTokenizer, pixel_values: Tensor, gumbel_noise: Tensor, ids: str) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of all that the tokenizer makes of images [batch, 3, height, width] and noise [batch, patch, 2].

    Mergers run as released, on every patch under masks.
    """
    encoded = tokenizer.encoder(pixel_values.float())
    yield "encoder_features", encoded
    features = encoded[:, 1:]
    yield "selector_log_probs", tokenizer.selector(features)
    codes, keep_mask = tokenizer.tokenize_features(features, gumbel_noise, masked=True)
    yield "keep_mask", keep_mask
    yield "merged_features", tokenizer.merger(features, keep_mask.to(features.dtype))
    yield "tokens_per_image", torch.tensor([len(of_image) for of_image in codes])
    flat = torch.cat(codes)
    yield ids, flat + _offset(ids)
    yield "quantized", tokenizer.quantizer.embedding(flat)
    if tokenizer.understanding is not None:
        yield CONTINUOUS, tokenizer.understanding(features, keep_mask, masked=True)
    packed = tokenizer.pack(codes)
    yield "decoder_lowres", tokenizer.decoder.condition(*packed)
    if tokenizer.highres_decoder is not None:
        yield from zip(HIGHRES, tokenizer.highres_decoder.condition(*packed), strict=True)


def expected_names(tokenizer: VisualTokenizer, vectors: Mapping[str, Tensor]) -> list[str]:
    """The tensors that a reference of these modules must hold."""
    names = ["encoder_features", "selector_log_probs", "keep_mask", "merged_features", "tokens_per_image"]
    names += [ids_name(vectors), "quantized"]
    names += [CONTINUOUS] if tokenizer.understanding is not None else []
    names += ["decoder_lowres"]
    return names + (list(HIGHRES) if tokenizer.highres_decoder is not None else [])


def ids_name(vectors: Mapping[str, Tensor]) -> str:
    """The name of the tensor of ids, which tells their offset."""
    return next((name for name in vectors if SHIFTED_IDS.fullmatch(name)), DEFAULT_IDS)


def _offset(ids: str) -> int:
    match = SHIFTED_IDS.fullmatch(ids)
    assert match is not None
    return int(match[1])


@torch.no_grad()
def _kept_rows(tokenizer: VisualTokenizer, outputs: Mapping[str, Tensor], noise: Tensor, ids: str) -> Iterator[Row]:
    """The merger on kept patches alone, which tokenizing uses, against the released form computed here.

    Some weights let the two differ by more than rounding, as `TokenMerger.merge_kept` says; while the ids are equal, that is told and
    is no fault of the folder.
    """
    features, keep_mask = outputs["encoder_features"][:, 1:], outputs["keep_mask"]
    codes = torch.cat(tokenizer.tokenize_features(features, noise).codes)
    same_ids = compare("ids, kept alone", codes + _offset(ids), outputs[ids])
    merged = compare(
        "merged_features, kept alone", tokenizer.merger.merge_kept(features, keep_mask), outputs["merged_features"][keep_mask]
    )
    yield merged._replace(ok=merged.ok or same_ids.ok)
    yield same_ids


def compare(name: str, actual: Tensor, reference: Tensor) -> Row:
    """The row of one tensor: integers must be equal, others within `LIMIT`."""
    exact = not actual.is_floating_point()
    limit = "100 %" if exact else f"{LIMIT:.0e}"
    if actual.shape != reference.shape:
        return Row(name, shape(reference), f"shape {shape(actual)} here", limit, False)
    if not reference.double().isfinite().all():
        return Row(name, shape(reference), "the reference is not finite", limit, False)
    if exact:
        share = (actual.double() == reference.double()).double().mean().item()
        return Row(name, shape(reference), f"{share:.2%} equal", limit, share == 1)
    difference = (actual.double() - reference.double()).abs().max() / reference.double().abs().max().clamp_min(1e-30)
    return Row(name, shape(reference), f"{difference:.1e}", limit, bool(difference <= LIMIT))


def codebook_row(tokenizer: VisualTokenizer, dtype: torch.dtype) -> Row:
    """Whether all codes have unit length, as the released ones, or none has; one that differs was altered, used or not.

    `dtype` is the type that they are stored in.
    """
    codebook = tokenizer.quantizer.embedding.weight
    unit = (codebook.norm(dim=-1) - 1).abs() <= max(LIMIT, torch.finfo(dtype).eps)
    ok = bool(unit.all() or not unit.any())
    return Row("codebook", shape(codebook), f"{unit.double().mean():.2%} unit", "all, none", ok)


def shape(tensor: Tensor) -> str:
    """A tensor's shape in a cell."""
    return " x ".join(map(str, tensor.shape)) or "1"


def wrong(name: str, sentence: str) -> Row:
    """The row of what is not there or can't be read."""
    return Row(name, "", sentence, "", False)


def unseen(tokenizer: VisualTokenizer, vectors: Mapping[str, Tensor]) -> list[str]:
    """What these vectors can't tell of the weights."""
    config = tokenizer.config
    name = ids_name(vectors)
    used = vectors[name].unique().numel()
    longest = int(vectors["tokens_per_image"].max())
    return [
        "no vector depends on the tower's norm.* and head.*, or on the biases of attention keys (a softmax takes them out)",
        f"of {config.codebook.size} codes {used} occur, of the decoder's {config.encoder.num_patches} pos_embed rows the first {longest}",
        f"encode_task_layer.* is seen by the {len(vectors[name])} ids alone",
    ]


def _input_rows(tokenizer: VisualTokenizer, vectors: Mapping[str, Tensor]) -> Iterator[Row]:
    encoder = tokenizer.config.encoder
    images = len(vectors[PIXELS]) if PIXELS in vectors else 0
    wanted = {PIXELS: (images, 3, encoder.image_size, encoder.image_size), NOISE: (images, encoder.num_patches, 2)}
    for name, sizes in wanted.items():
        if name not in vectors:
            yield wrong(name, "missing from the vectors")
        elif tuple(vectors[name].shape) != sizes:
            yield Row(name, shape(vectors[name]), f"the sizes ask for {' x '.join(map(str, sizes))}", "", False)
        elif not vectors[name].double().isfinite().all():
            yield Row(name, shape(vectors[name]), "the input is not finite", "", False)
        else:
            yield Row(name, shape(vectors[name]), "input", "", True)
