"""Rules keep what they ask for, whatever the columns hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.config.base import build
from lavit_dist.config.filter import FilterRule
from lavit_dist.data.filtering import image_columns, refusing_rule
from lavit_dist.errors import UserError


@given(value=st.one_of(st.none(), st.text(), st.floats(), st.booleans(), st.lists(st.integers())), least=st.floats(-2, 2))
def test_what_a_bound_keeps_is_a_number_within_it(value, least):
    rule = FilterRule(min=least)
    if refusing_rule({"column": rule}, {"column": value}) is None:
        assert float(value) >= least


@pytest.mark.parametrize(
    ("rule", "kept", "left_out"),
    [
        (FilterRule(min=0.3), [0.3, "0.31", 1], [0.29, "0.2", None, "much", float("nan"), [1]]),
        (FilterRule(min=0.3, max=0.4, missing="keep"), [0.35, None, "much"], [0.41]),
        (FilterRule(any_of=("UNLIKELY", "UNSURE")), ["UNLIKELY", "UNSURE"], ["NSFW", "unlikely", None]),
        (FilterRule(none_of=("NSFW",), missing="keep"), ["UNLIKELY", None], ["NSFW"]),
        (FilterRule(any_of=("en", "de"), none_of=("de",)), ["en"], ["de", "fr"]),
    ],
)
def test_rules(rule, kept, left_out):
    assert [value for value in [*kept, *left_out] if refusing_rule({"c": rule}, {"c": value}) is None] == kept
    assert (refusing_rule({"c": rule}, {}) is None) == (rule.missing == "keep")


def test_the_first_rule_that_refuses_is_named():
    rules = {"a": FilterRule(min=1), "b": FilterRule(min=1)}
    assert [refusing_rule(rules, values) for values in ({"a": 1, "b": 1}, {"a": 0, "b": 0}, {"a": 1, "b": 0})] == [None, "a", "b"]


def test_columns_of_the_picture():
    assert image_columns(200, 100) == {
        "image_width": 200, "image_height": 100, "image_shorter_side": 100, "image_aspect_ratio": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "sentence"),
    [({}, "filter.similarity asks for nothing"), ({"min": 2, "max": 1}, "filter.similarity has min 2.0 above max 1.0")],
)
def test_rules_that_make_no_sense(values, sentence):
    with pytest.raises(UserError, match=sentence):
        build(FilterRule, values).check_as("filter.similarity")
