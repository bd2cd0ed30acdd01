"""The order is a permutation, depends on seed and epoch alone, and is the same for ever."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.data.order import epoch_blocks, fractions, hash64, permutation

KEYS = st.tuples(st.integers(0, 2**40), st.integers(0, 100))


@given(st.integers(0, 500), KEYS)
def test_a_permutation_covers(size, key):
    assert sorted(permutation(size, *key)) == list(range(size))


@given(KEYS, KEYS)
def test_another_key_gives_another_order(key, other):
    assert np.array_equal(permutation(100, *key), permutation(100, *other)) == (key == other)


def test_hashes_are_what_they_were():
    """Pinned: a change would silently reorder the data of every run that is resumed."""
    assert hash64(np.arange(3, dtype=np.uint64), 7, 1).tolist() == [8075172986249684972, 14574897457539200646, 1650069959653123811]
    assert permutation(8, 7, 1).tolist() == [7, 2, 6, 0, 4, 1, 3, 5]


def test_fractions_are_uniform():
    counts, _ = np.histogram(fractions(np.arange(10**5, dtype=np.uint64), 3), bins=10, range=(0, 1))
    assert np.all(np.abs(counts - 10**4) < 500)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=30), st.integers(1, 100), KEYS)
def test_blocks_hold_every_shard_once_and_are_large_enough(sizes, least, key):
    starts = np.cumsum([0, *sizes])
    blocks = epoch_blocks(starts, *key, least)
    assert sorted(np.concatenate(blocks)) == list(range(len(sizes)))
    assert len(blocks) == 1 or min(np.array(sizes)[shards].sum() for shards in blocks) >= least
