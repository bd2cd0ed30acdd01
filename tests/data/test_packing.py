"""Every document is in one row, no row is too long, and hardly any room is wasted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.data.order import BLOCK_DOCUMENTS
from lavit_dist.data.packing import pack

LENGTHS = st.lists(st.integers(1, 70), max_size=300)
"""Up to a row's capacity, which is more than one word of a bit set."""


@given(LENGTHS)
def test_rows_hold_whole_documents_and_never_too_much(lengths):
    lengths = np.array(lengths, np.int64)
    rows = pack(lengths, 70)
    filled = np.bincount(rows, weights=lengths)
    assert len(rows) == len(lengths)
    assert np.all(filled > 0)
    assert np.all(filled <= 70)


@given(LENGTHS)
def test_no_document_of_a_later_row_would_have_fitted_an_earlier_one(lengths):
    lengths = np.array(lengths, np.int64)
    rows = pack(lengths, 70)
    filled = np.bincount(rows, weights=lengths)
    for row, taken in enumerate(filled):
        assert np.all(lengths[rows > row] > 70 - taken)


@given(st.permutations(range(6)))
def test_of_equal_documents_the_first_goes_first(order):
    lengths = np.array([10, 20, 30, 10, 20, 30])[list(order)]
    rows = pack(lengths, 30)
    for length in (10, 20, 30):
        of_this_length = rows[lengths == length]
        assert np.all(np.diff(of_this_length) >= 0)


@pytest.mark.parametrize(
    ("lengths", "rows"), [([30, 40, 20, 10], 1), ([60, 50, 40, 30, 20], 2), ([51, 51, 51], 3), ([100], 1), ([], 0)]
)
def test_what_fills_rows_exactly_is_found(lengths, rows):
    assert len(set(pack(np.array(lengths, np.int64), 100).tolist())) == rows


def lavit_like(seed):
    """Mean 112, 99th percentile 178: 90 codes on average beside a caption (simulated)."""
    rng = np.random.default_rng(seed)
    codes = rng.normal(90, 22.5, BLOCK_DOCUMENTS).clip(20, 200)
    text = rng.lognormal(np.log(16), 0.6, BLOCK_DOCUMENTS).clip(3, 80)
    return (codes + text).astype(np.int64) + 3


@pytest.mark.parametrize(("seq_len", "padding"), [(1024, 0.004), (2048, 0.003), (4096, 0.002)])
@pytest.mark.parametrize("without_caption", [0.0, 0.1])
def test_lavit_like_lengths_leave_little_room(seq_len, padding, without_caption):
    lengths = lavit_like(0)
    lengths[np.random.default_rng(1).random(len(lengths)) < without_caption] -= 16
    rows = pack(lengths, seq_len)
    assert 1 - lengths.sum() / ((rows.max() + 1) * seq_len) < padding


def test_long_documents_among_short_ones_leave_little_room():
    rng = np.random.default_rng(2)
    lengths = np.where(rng.random(BLOCK_DOCUMENTS) < 0.2, rng.integers(1, 2049, BLOCK_DOCUMENTS), lavit_like(3))
    rows = pack(lengths, 2048)
    assert 1 - lengths.sum() / ((rows.max() + 1) * 2048) < 0.01


@pytest.mark.parametrize("lengths", [[3, 41], [0, 3]])
def test_a_document_that_fits_no_row_is_a_defect_of_the_caller(lengths):
    with pytest.raises(ValueError, match=f"{min(lengths)} to {max(lengths)} tokens can't be packed"):
        pack(np.array(lengths), 40)
