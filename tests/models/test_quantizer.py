"""The codebook: nearest codes, statistics that add up, codes that come back, and k-means."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lavit_dist.config.model import CodebookConfig
from lavit_dist.models.quantizer import VectorQuantizer, spherical_kmeans

SIZE, DIM = 24, 8


def unit(count: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)), dim=-1)


def quantizer(**settings) -> VectorQuantizer:
    torch.manual_seed(0)
    return VectorQuantizer(CodebookConfig(size=SIZE, dim=DIM, **settings))


@given(st.integers(0, 2**31), st.integers(0, 41))
@settings(max_examples=25, deadline=None)
def test_statistics_of_shards_sum_to_those_of_the_whole(seed, cut):
    codebook, vectors = quantizer(), unit(41, seed)
    codes = codebook(vectors).codes
    counts, sums = codebook.statistics(vectors, codes)
    left, right = codebook.statistics(vectors[:cut], codes[:cut]), codebook.statistics(vectors[cut:], codes[cut:])
    torch.testing.assert_close(counts, left[0] + right[0])
    torch.testing.assert_close(sums, left[1] + right[1])


@given(st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_a_vector_gets_the_code_nearest_by_cosine_and_its_gradient_passes_through(seed):
    codebook, vectors = quantizer(), unit(30, seed).requires_grad_()
    quantized = codebook(vectors)
    assert torch.equal(quantized.codes, (vectors @ codebook.embedding.weight.t()).argmax(-1))
    torch.testing.assert_close(quantized.vectors, codebook.embedding.weight[quantized.codes])
    upstream = unit(30, seed + 1)
    (quantized.vectors * upstream).sum().backward()
    torch.testing.assert_close(vectors.grad, upstream)
    assert codebook.embedding.weight.grad is None


def test_codes_are_those_of_fp32_under_autocast():
    codebook, vectors = quantizer(), unit(300)
    with torch.autocast("cpu", torch.bfloat16):
        under = codebook(vectors).codes
    assert torch.equal(under, codebook(vectors).codes)


def test_a_collapsed_codebook_stays_of_unit_length_and_its_dead_codes_come_back():
    codebook, vectors = quantizer(decay=0.9), unit(500)
    codebook.embedding.weight[:] = F.normalize(torch.ones(DIM), dim=0)  # every vector goes to code 0
    revived = 0
    for step in range(60):
        quantized = codebook(vectors)
        dead = codebook.update(*codebook.statistics(vectors, quantized.codes))
        revived += codebook.revive(dead, vectors[torch.randperm(500, generator=torch.Generator().manual_seed(step))])
    torch.testing.assert_close(codebook.embedding.weight.norm(dim=-1), torch.ones(SIZE))
    assert revived >= SIZE // 2
    assert len(codebook(vectors).codes.unique()) >= 0.9 * SIZE


def test_nothing_is_revived_where_the_share_is_zero_and_no_more_than_there_are_candidates():
    codebook, vectors = quantizer(revive_below=0.0), unit(10)
    assert len(codebook.update(*codebook.statistics(vectors, torch.zeros(10, dtype=torch.int64)))) == 0
    before = codebook.embedding.weight.clone()
    assert codebook.revive(torch.arange(SIZE), vectors[:3]) == 3
    assert torch.equal(codebook.embedding.weight[3:], before[3:])


def test_rare_codes_of_a_loaded_codebook_are_not_dead_at_the_first_step():
    codebook, vectors = quantizer(), unit(10)
    assert not codebook.hits.any()  # files hold no statistics
    assert len(codebook.update(*codebook.statistics(vectors, torch.zeros(10, dtype=torch.int64)))) == 0


def test_a_codebook_that_learns_by_gradients_is_not_moved_by_averages():
    codebook, vectors = quantizer(learning="gradient"), unit(40)
    codebook.embedding.weight.requires_grad_(True)
    before = codebook.embedding.weight.detach().clone()
    quantized = codebook(vectors)
    codebook.update(*codebook.statistics(vectors, quantized.codes))
    assert torch.equal(codebook.embedding.weight, before)
    quantized.chosen.sum().backward()
    assert codebook.embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("count", [200, SIZE, 5])
def test_kmeans_centres_are_unit_and_distinct(count):
    centres, counts = spherical_kmeans(unit(count), SIZE, torch.Generator().manual_seed(0), iterations=5)
    assert centres.shape == (SIZE, DIM)
    torch.testing.assert_close(centres.norm(dim=-1), torch.ones(SIZE))
    assert len(centres.unique(dim=0)) == SIZE
    assert counts.sum() == count
