"""The codebook learner: how images are shared out changes nothing, and use is counted over its window."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.config.model import CodebookConfig
from lavit_dist.engine.codebook import CodebookLearner, TokenVectors
from lavit_dist.models.quantizer import VectorQuantizer

SIZE, DIM = 16, 4


def learner(window: int = 3, **settings) -> CodebookLearner:
    torch.manual_seed(0)
    return CodebookLearner(VectorQuantizer(CodebookConfig(size=SIZE, dim=DIM, **settings)), seed=1, usage_window=window)


def images(lengths: list[int], seed: int) -> list[TokenVectors]:
    generator = torch.Generator().manual_seed(seed)
    return [TokenVectors(place, F.normalize(torch.randn(n, DIM, generator=generator), dim=-1)) for place, n in enumerate(lengths)]


def collect(codebook: CodebookLearner, batch: list[TokenVectors]) -> None:
    unit = torch.cat([image.unit for image in batch])
    lengths = [len(image.unit) for image in batch]
    codebook.collect([image.position for image in batch], lengths, unit, codebook.quantizer.assign(unit))


@given(st.lists(st.integers(1, 9), min_size=2, max_size=8), st.integers(0, 99), st.randoms())
def test_micro_batches_in_any_order_move_the_codebook_alike(lengths, seed, random):
    """Revived codes too: what they are put onto is drawn by the images' places."""
    whole, parts = learner(revive_below=0.9), learner(revive_below=0.9)
    batch = images(lengths, seed)
    collect(whole, batch)
    shuffled = random.sample(batch, len(batch))
    cut = random.randint(1, len(batch) - 1)
    for part in (shuffled[:cut], shuffled[cut:]):
        collect(parts, part)
    assert whole.update(5, learn=True) == pytest.approx(parts.update(5, learn=True))
    torch.testing.assert_close(whole.quantizer.embedding.weight, parts.quantizer.embedding.weight)


def test_a_codebook_that_does_not_learn_is_watched_and_stays():
    codebook = learner()
    before = codebook.quantizer.embedding.weight.clone()
    collect(codebook, images([5, 5], 0))
    figures = codebook.update(0, learn=False)
    assert torch.equal(codebook.quantizer.embedding.weight, before)
    assert figures["codes_revived"] == 0
    assert figures["codes_used"] > 0


def test_a_code_counts_as_used_for_as_many_steps_as_the_window_has():
    codebook = learner(window=3, revive_below=0.0)
    vector = codebook.quantizer.embedding.weight[:1].clone()
    other = codebook.quantizer.embedding.weight[1:2].clone()
    shares = []
    for step in range(6):
        collect(codebook, [TokenVectors(0, vector if step == 0 else other)])
        shares.append(codebook.update(step, learn=True)["codes_used"] * SIZE)
    assert shares == [1, 2, 2, 1, 1, 1]


def test_its_state_restores_it():
    first, second = learner(), learner()
    collect(first, images([4, 4], 1))
    first.update(7, learn=True)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.quantizer.hits, second.quantizer.hits)
    assert torch.equal(first.last_hit, second.last_hit)


def test_kmeans_sets_the_codebook_whatever_order_images_come_in():
    first, second = learner(), learner()
    batch = images([9] * 10, 2)
    first.initialise(batch, batches=2)
    second.initialise(batch[::-1], batches=2)
    torch.testing.assert_close(first.quantizer.embedding.weight, second.quantizer.embedding.weight)
    assert first.quantizer.hits.sum() == pytest.approx(45)
