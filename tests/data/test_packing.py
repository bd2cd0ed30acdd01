"""Every document is in one row, no row is too long, and little room is wasted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.data.packing import best_fit_decreasing


@given(st.lists(st.integers(1, 40), max_size=200))
def test_rows_hold_whole_documents_and_never_too_much(lengths):
    lengths = np.array(lengths, np.int64)
    rows = best_fit_decreasing(lengths, 40)
    filled = np.bincount(rows, weights=lengths)
    assert len(rows) == len(lengths)
    assert np.all(filled > 0)
    assert np.all(filled <= 40)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=200))
def test_the_result_is_that_of_the_plain_algorithm(lengths):
    rows: list[int] = []  # the room left in each
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rows if room >= length]
        if fitting:
            rows.remove(min(fitting))
        rows.append(min(fitting, default=40) - length)
    packed = best_fit_decreasing(np.array(lengths), 40)
    filled = np.bincount(packed, weights=lengths)
    assert sorted(40 - filled) == sorted(rows)


def test_lavit_like_lengths_waste_at_most_a_third_of_a_percent():
    lengths = np.clip(np.random.default_rng(0).normal(112, 25, 65536), 20, 283).astype(int)
    rows = best_fit_decreasing(lengths, 2048)
    assert 1 - lengths.sum() / ((rows.max() + 1) * 2048) < 0.0035


def test_a_document_that_fits_no_row_is_a_defect_of_the_caller():
    with pytest.raises(ValueError, match="41 tokens"):
        best_fit_decreasing(np.array([3, 41]), 40)
