"""New rows lie among the text rows, and the same seed gives the same."""

import pytest
import torch

from lavit_dist.config.model import LlamaConfig
from lavit_dist.models.llama import NEW_EMBEDDING, NEW_HEAD
from lavit_dist.models.new_rows import mean_noise_rows, projected_rows, row_statistics

WIDTH, CODES = 32, 400
MODEL = LlamaConfig(hidden_size=WIDTH)
SHAPE = (CODES + 2, WIDTH)


@pytest.fixture
def text() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.5, 2, WIDTH)
    return 3 + spread * torch.randn(900, WIDTH, generator=generator)


def test_statistics_of_parts_are_those_of_the_table(text):
    whole = row_statistics(text.split(128))
    torch.testing.assert_close(whole.mean, text.mean(0))
    torch.testing.assert_close(whole.std, text.std(0, correction=0))


def test_noise_has_the_spread_of_text_channel_by_channel(text):
    rows = mean_noise_rows(MODEL, NEW_EMBEDDING, SHAPE, row_statistics([text]), seed=0)
    assert rows.shape == SHAPE
    torch.testing.assert_close(rows.mean(0), text.mean(0), atol=0.3, rtol=0)
    torch.testing.assert_close(rows.std(0), text.std(0), atol=0, rtol=0.2)


@pytest.mark.parametrize("dim", [8, 64])
def test_projected_codes_keep_their_likeness_and_are_as_far_out_as_text(text, dim):
    codes = torch.nn.functional.normalize(torch.randn(CODES, dim, generator=torch.Generator().manual_seed(1)), dim=1)
    codes[1] = codes[0]
    rows = projected_rows(MODEL, NEW_EMBEDDING, SHAPE, row_statistics([text]), codes, seed=0)
    assert rows.shape == SHAPE
    ours = rows[2:]
    assert torch.equal(ours[0], ours[1])
    torch.testing.assert_close(ours.mean(0), text.mean(0), atol=1e-3, rtol=0)
    distance = (text - text.mean(0)).square().sum(1).mean()
    torch.testing.assert_close((ours - ours.mean(0)).square().sum(1).mean(), distance, rtol=1e-3, atol=0)
    if dim <= WIDTH:  # turned and scaled, nothing else: distances between codes keep their ratios
        before, after = torch.pdist(codes), torch.pdist(ours)
        kept = before > 0.1
        torch.testing.assert_close(
            (after / before)[kept], (after[kept] / before[kept]).mean().expand(int(kept.sum())), rtol=1e-3, atol=0
        )


def test_rows_depend_on_seed_and_name_alone(text):
    statistics = row_statistics([text])
    first = mean_noise_rows(MODEL, NEW_EMBEDDING, SHAPE, statistics, seed=0)
    torch.manual_seed(5)
    assert torch.equal(first, mean_noise_rows(MODEL, NEW_EMBEDDING, SHAPE, statistics, seed=0))
    assert not torch.equal(first, mean_noise_rows(MODEL, NEW_EMBEDDING, SHAPE, statistics, seed=1))
    assert not torch.equal(first, mean_noise_rows(MODEL, NEW_HEAD, SHAPE, statistics, seed=0))
