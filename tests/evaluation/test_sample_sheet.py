"""Sample sheets: what they show is what the tokenizer does, and drawing one leaves the run as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from lavit_dist.config.model import CodebookConfig, MergerConfig, TokenizerDecoderConfig, VisionEncoderConfig, VisualTokenizerConfig
from lavit_dist.engine.token_counts import TokenCounts
from lavit_dist.evaluation.panels import ERROR_COLOURS, heat_map
from lavit_dist.evaluation.patch_bank import PatchBank, join_patches, split_patches
from lavit_dist.evaluation.sample_sheet import SampleSheet, Seen, look
from lavit_dist.evaluation.sheet_callback import SampleSheetCallback
from lavit_dist.models.visual_tokenizer import VisualTokenizer

CONFIG = VisualTokenizerConfig(
    encoder=VisionEncoderConfig(image_size=32, patch_size=8, width=32, layers=1, head_width=8, mlp_hidden=32, head_out=8),
    merger=MergerConfig(layers=1, heads=4, mlp_hidden=32),
    codebook=CodebookConfig(size=64, dim=8),
    decoder=TokenizerDecoderConfig(depth=1, heads=4, mlp_hidden=32, unet_dim=8),
)


@pytest.fixture
def tokenizer() -> VisualTokenizer:
    torch.manual_seed(0)
    return VisualTokenizer(CONFIG)


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.randn((count, 3, 32, 32), generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4))
def test_patches_join_to_the_picture_they_were_split_from(images: int, grid: int, size: int) -> None:
    pixels = torch.randn(images, 3, grid * size, grid * size)
    patches = split_patches(pixels, grid**2)
    assert patches.shape == (images, grid**2, 3, size, size)
    assert torch.equal(join_patches(patches), pixels)
    row, column = divmod(grid**2 - 1, grid)
    assert torch.equal(patches[0, -1], pixels[0, :, row * size : (row + 1) * size, column * size : (column + 1) * size])


@given(st.floats(0.1, 10), st.integers(0, 100))
def test_a_mosaic_of_features_in_the_bank_is_their_picture_unless_it_is_barred(scale: float, seed: int) -> None:
    pixels, features = pictures(3, seed), torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(seed))
    numbers = torch.arange(3)
    bank = PatchBank.draw(pixels, features, numbers, 48, torch.Generator().manual_seed(seed))
    assert torch.equal(bank.mosaic(scale * features), pixels)
    others = split_patches(bank.mosaic(features, numbers), 16)
    own = split_patches(pixels, 16)
    for picture in range(3):
        assert not (others[picture].flatten(1)[:, None] == own[picture].flatten(1)[None]).all(-1).any()


def test_banks_join_and_are_no_larger_than_asked() -> None:
    pixels, features = pictures(4), torch.randn(4, 16, 8)
    parts = [
        PatchBank.draw(pixels[i : i + 2], features[i : i + 2], torch.arange(i, i + 2), 10, torch.Generator().manual_seed(0))
        for i in (0, 2)
    ]
    bank = PatchBank.join(parts)
    assert bank.pixels.shape == (20, 3, 8, 8)
    assert set(bank.images[:10].tolist()) <= {0, 1}
    assert torch.allclose(bank.features.norm(dim=-1), torch.ones(20))


@torch.no_grad()
def test_with_a_codebook_that_loses_nothing_the_quantizer_changes_nothing(tokenizer: VisualTokenizer) -> None:
    features = tokenizer.encode(pictures(3))
    seen = look(tokenizer, features, quantize=False)
    merged = tokenizer.merger(features, seen.keep_mask.float())
    vectors = F.normalize(tokenizer.tokenizer_encoder.encode_task_layer(merged[seen.keep_mask]), dim=-1)
    assert len(vectors) <= CONFIG.codebook.size
    tokenizer.quantizer.embedding.weight[: len(vectors)] = vectors
    quantized = look(tokenizer, features, quantize=True)
    assert torch.equal(quantized.keep_mask, seen.keep_mask)
    assert torch.allclose(quantized.features, seen.features, atol=1e-5)


@pytest.mark.parametrize("quantizing", [0.0, 1.0])
def test_the_callback_draws_when_it_should_and_leaves_no_trace(
    tokenizer: VisualTokenizer, tmp_path: Path, quantizing: float
) -> None:
    tokenizer.train()
    tokenizer.decoder.eval()
    modes = [module.training for module in tokenizer.modules()]
    weights = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    torch.manual_seed(5)
    random, numpy_random = torch.get_rng_state(), np.random.get_state()[1].copy()
    counts = TokenCounts(16)
    callback = SampleSheetCallback(tmp_path, 3, tokenizer, pictures(2), pictures(5, 1), counts)
    callback.on_start(0, 7)
    for step in range(1, 8):
        counts.add(torch.tensor([5.0, 9.0]))
        callback.after_step(step, {"quantizing": quantizing})
    assert sorted(path.name for path in (tmp_path / "sheets").iterdir()) == [f"step-0000000{step}.png" for step in (3, 6, 7)]
    assert torch.equal(torch.get_rng_state(), random)
    assert np.array_equal(np.random.get_state()[1], numpy_random)
    assert [module.training for module in tokenizer.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in tokenizer.state_dict().items())
    assert all(parameter.grad is None for parameter in tokenizer.parameters())
    assert not any(counts.take())


def test_ranks_above_0_draw_nothing(tokenizer: VisualTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    callback = SampleSheetCallback(tmp_path, 1, tokenizer, pictures(2), pictures(2, 1))
    callback.on_start(0, 1)
    callback.after_step(1, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kept", [0, 16])
def test_an_image_of_which_nothing_or_everything_is_kept_is_drawn(tokenizer: VisualTokenizer, kept: int) -> None:
    sheet = SampleSheet(tokenizer, pictures(2), pictures(2, 1))
    mask = torch.arange(16).expand(2, -1) < kept
    one, two = (sheet.arrange(Seen(mask, sheet.features), title) for title in ("a", "b"))
    assert one.size == two.size
    assert one.tobytes() != two.tobytes()


def test_a_heat_map_is_brighter_where_the_values_are_larger() -> None:
    picture = heat_map(Image.new("RGB", (32, 32)), torch.tensor([0.0, 0.1, 0.2, 0.4]), 0, 0.4, ERROR_COLOURS, 20)
    brightness = [sum(picture.getpixel((x, y))) for y in (5, 15) for x in (5, 15)]
    assert brightness == sorted(brightness)
    assert brightness[0] < brightness[-1]


@given(st.lists(st.lists(st.integers(0, 16), max_size=5), max_size=5))
def test_token_counts_hold_each_image_once(batches: list[list[int]]) -> None:
    counts = TokenCounts(16)
    for batch in batches:
        counts.add(torch.tensor(batch, dtype=torch.float32))
    everything = [tokens for batch in batches for tokens in batch]
    assert counts.take() == [everything.count(tokens) for tokens in range(17)]
    assert sum(counts.take()) == 0
