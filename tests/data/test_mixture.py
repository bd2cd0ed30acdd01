"""The shares of a mixture: kept to within a row, over any window, whatever came before; and the same however a run was cut."""

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lavit_dist.data.mixture import MILLION, Asked, Mixture, Phase, plan, row_shares, shares_cycle

NAMES = [f"source{index}" for index in range(6)]
WEIGHTS = st.dictionaries(st.sampled_from(NAMES), st.floats(0.01, 1) | st.integers(1, 9), min_size=1)
LIMITS = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 300))
WINDOW = 10_000


@st.composite
def curricula(draw):
    """Weights from row 0 on, then others every few hundred rows."""
    asked, row = [], 0
    for weights in draw(st.lists(WEIGHTS, min_size=1, max_size=4)):
        asked.append(Asked(row, weights))
        row += draw(st.integers(1, 400))
    return asked


def rows_of(mixture, stop, start=0):
    """The source and row of each row from `start` to `stop`, or to the end of the mixture."""
    return [mixture.locate(row) for row in range(start, stop if mixture.end is None else min(stop, mixture.end))]


@given(WEIGHTS)
def test_every_source_has_its_due_to_within_a_row(weights):
    shares = row_shares(weights)
    assert sum(shares.values()) == MILLION
    cycle = shares_cycle(shares)
    due = np.arange(1, len(cycle) + 1)
    for source, (name, share) in enumerate(shares.items()):
        assert abs(share / MILLION - weights[name] / sum(weights.values())) < 1e-5
        given_rows = np.cumsum(cycle.source_of == source)
        assert given_rows[-1] * MILLION == share * len(cycle)
        bound = 1 - 1 / max(1, 2 * len(shares) - 2)
        assert np.abs(given_rows - due * (share / MILLION)).max() <= bound + 1e-9


@given(WEIGHTS, WEIGHTS, st.integers(1, 9_000))
def test_any_ten_thousand_rows_have_the_shares_that_were_asked(before, after, border):
    mixture = plan([Asked(0, before), Asked(border, after)], {})
    sources = [source for source, _ in rows_of(mixture, border + WINDOW)]
    for name in NAMES:
        shares = [weights.get(name, 0) / sum(weights.values()) for weights in (before, after)]
        due = np.cumsum([0.0] + [shares[row >= border] for row in range(len(sources))])
        found = np.cumsum([0] + [source == name for source in sources])
        windows = (found[WINDOW:] - found[:-WINDOW]) - (due[WINDOW:] - due[:-WINDOW])
        assert np.abs(windows).max() / WINDOW < 0.001


@given(curricula(), LIMITS)
def test_a_source_gives_its_rows_in_order_and_none_beyond_its_limit(asked, limits):
    mixture = plan(asked, limits)
    seen = dict.fromkeys(NAMES, 0)
    for row, (source, index) in enumerate(rows_of(mixture, 2000)):
        assert mixture.consumed(row) == {name: seen[name] for name in mixture.consumed(row)}
        assert index == seen[source]
        seen[source] += 1
        assert seen[source] <= limits.get(source, seen[source])
        in_force = [part for part in asked if part.first_row <= row][-1]
        assert in_force.weights[source] > 0
    if mixture.end is not None and mixture.end < 2000:
        in_force = [part for part in asked if part.first_row <= mixture.end][-1]
        assert all(seen[name] == limits[name] for name in in_force.weights)
        with pytest.raises(IndexError, match=f"after {mixture.end} rows"):
            mixture.locate(mixture.end)


@given(curricula(), LIMITS)
def test_the_others_share_the_weight_of_a_source_that_is_used_up(asked, limits):
    mixture = plan(asked, limits)
    for phase in mixture.phases:
        in_force = [part for part in asked if part.first_row <= phase.first_row][-1]
        consumed = mixture.consumed(phase.first_row)
        left = {name: weight for name, weight in in_force.weights.items() if consumed.get(name, 0) < limits.get(name, MILLION)}
        assert phase.shares == row_shares(left)


@given(curricula(), LIMITS, st.data())
def test_a_plan_that_goes_on_anywhere_is_the_straight_one(asked, limits, data):
    straight = plan(asked, limits)
    row = data.draw(st.integers(0, 1500 if straight.end is None else straight.end))
    history = [phase for phase in straight.phases if phase.first_row < row]
    resumed = plan(asked, limits, history, row)
    assert resumed.phases == straight.phases
    assert resumed.end == straight.end


@given(curricula(), curricula(), LIMITS, st.integers(1, 800))
def test_other_weights_begin_at_the_row_they_are_given_at(asked, others, limits, row):
    before = plan(asked, limits)
    assume(before.end is None or before.end > row)
    after = plan(others, limits, before.phases, row)
    assert rows_of(after, row) == rows_of(before, row)
    assert Counter(after.consumed(row)) == Counter(before.consumed(row))
    in_force = [part for part in others if part.first_row <= row][-1]
    left = {
        name: weight for name, weight in in_force.weights.items() if before.consumed(row).get(name, 0) < limits.get(name, MILLION)
    }
    if left:
        assert [phase.shares for phase in after.phases if phase.first_row <= row][-1] == row_shares(left)
    else:
        assert after.end == row


@given(WEIGHTS, st.randoms())
def test_the_order_in_which_sources_are_named_does_not_matter(weights, random):
    items = list(weights.items())
    random.shuffle(items)
    assert rows_of(plan([Asked(0, dict(items))], {}), 300) == rows_of(plan([Asked(0, weights)], {}), 300)


def test_decimal_weights_are_exact():
    assert row_shares({"b": 0.7, "a": 0.2, "c": 0.1, "d": 0}) == {"a": 200_000, "b": 700_000, "c": 100_000}
    assert len(shares_cycle({"a": 200_000, "b": 700_000, "c": 100_000})) == 10


def test_a_source_of_the_smallest_weight_is_not_forgotten():
    shares = row_shares({"large": 1.0, "small": 1e-9})
    assert shares == {"large": 999_999, "small": 1}
    assert plan([Asked(0, {"large": 1.0, "small": 1e-9})], {}).consumed(5 * MILLION) == {"large": 4_999_995, "small": 5}


def test_a_late_row_is_found_at_once():
    mixture = plan([Asked(0, {"a": 1, "b": 2, "c": 3.3}), Asked(50_000_000, {"a": 1, "b": 1})], {"b": 10**9})
    mixture.locate(0)  # compiles
    start = time.perf_counter()
    source, index = mixture.locate(60_000_000)
    assert time.perf_counter() - start < 0.5
    assert mixture.consumed(60_000_001)[source] == index + 1
    assert sum(mixture.consumed(60_000_000).values()) == 60_000_000


def test_the_order_of_sources_is_what_it_was():
    """Pinned: another order would silently reorder the data of every run that is resumed."""
    mixture = Mixture([Phase(0, {"a": 500_000, "b": 300_000, "c": 200_000})])
    assert "".join(mixture.locate(row)[0] for row in range(20)) == "abacabacababacabacab"
