"""Names of pairs and the choice of what is held out."""

from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.data.pair_keys import SAFE_KEY, choose_heldout, make_keys

names = st.lists(
    st.tuples(st.one_of(st.sampled_from(["a", "b", "../x", "a.b", ""]), st.text(max_size=90)), st.text(max_size=5)), max_size=30
)


@given(wanted=names)
def test_keys_are_safe_distinct_and_kept_where_they_can_be(wanted):
    keys = make_keys(wanted)
    assert len(keys) == len(wanted)
    assert len(set(keys)) == len(keys)
    assert all(SAFE_KEY.fullmatch(key) for key in keys)
    assert keys == make_keys(wanted)
    for position, (key, _) in enumerate(wanted):
        if SAFE_KEY.fullmatch(key) and key not in [earlier for earlier, _ in wanted[:position]]:
            assert keys[position] == key


@given(number=st.integers(0, 60), fraction=st.floats(0.001, 0.5), seed=st.integers(0, 99), damaged=st.sets(st.integers(0, 60)))
def test_both_splits_get_a_usable_pair_whenever_two_are_usable(number, fraction, seed, damaged):
    keys = [f"k{index}" for index in range(number)]
    usable = {key for index, key in enumerate(keys) if index not in damaged}
    heldout = choose_heldout(keys, fraction, seed, usable.__contains__)
    assert bool(usable & heldout) == (len(usable) >= 2)
    assert bool(usable - heldout) == (len(usable) >= 1)
    assert choose_heldout(keys, 0, seed, usable.__contains__) == set()


def test_the_share_is_right_and_a_new_pair_moves_no_other():
    keys = [f"k{index}" for index in range(4000)]
    heldout = choose_heldout(keys, 0.1, 0, lambda key: True)
    assert 340 < len(heldout) < 460
    assert choose_heldout(keys[:2000], 0.1, 0, lambda key: True) == heldout & set(keys[:2000])
    assert choose_heldout(keys, 0.1, 1, lambda key: True) != heldout
