"""Scores that are right where the answer is known."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.data.pairs import PairSample
from lavit_dist.data.shapes import make_scene_maker
from lavit_dist.data.tar_reader import FileLocation
from lavit_dist.evaluation.captions import first_named, score_captions, stated_count, stated_position
from lavit_dist.evaluation.probe import shares_right, train_probe
from lavit_dist.evaluation.scores import has_truth
from lavit_dist.evaluation.tokenizer_health import spearman, tokens_follow_objects

SCENES = [make_scene_maker(0, ("colour", "shape"), 0.2).scene("train", index) for index in range(200)]
TRUTH = [scene.metadata(64) for scene in SCENES]


@pytest.mark.parametrize("which", [0, 1])
def test_the_captions_of_the_set_are_all_right(which):
    scores = score_captions([scene.captions[which] for scene in SCENES], TRUTH)
    assert scores["colour"] == scores["shape"] == scores["all"] == 1
    if which == 0:  # the full caption; a short one names the main object alone
        assert scores["position"] == scores["count"] == 1
        assert scores["position_stated"] == len(SCENES)
        assert scores["count_stated"] == sum(len(scene.things) > 1 for scene in SCENES)


@pytest.mark.parametrize(
    ("metadata", "is_scene"),
    [(TRUTH[0], True), ({}, False), ({"objects": []}, False), ({"objects": "dog"}, False), ({"objects": [{"name": "dog"}]}, False)],
)
def test_only_scenes_say_what_is_in_them(metadata, is_scene):
    assert has_truth(PairSample("key", FileLocation("0.tar", 0, 1), ("a dog",), metadata)) == is_scene


def test_captions_of_other_scenes_are_mostly_wrong():
    shifted = [SCENES[index - 1].captions[0] for index in range(len(SCENES))]
    assert score_captions(shifted, TRUTH)["all"] < 0.2


def test_what_a_caption_says():
    caption = "There is a large red star on the left with two small green crosses and a small blue ring, on a plain grey background"
    assert first_named(caption, {"red", "green", "blue"}) == "red"
    assert first_named("nothing at all", {"red"}) is None
    assert stated_position(caption) == "left"
    assert stated_position("a red star") is None
    assert stated_count(caption) == 4
    assert stated_count("a red star") is None


ranks = st.lists(st.integers(0, 8), min_size=3, max_size=30)


@given(ranks)
def test_rank_correlation_sees_order_alone(values):
    expected = 1.0 if len(set(values)) > 1 else 0.0
    assert spearman(values, [value**3 + 1 for value in values]) == pytest.approx(expected)
    assert spearman(values, [-value for value in values]) == pytest.approx(-expected)


def test_rank_correlation_shares_ties():
    first, second = [1, 2, 2, 3], [10, 20, 30, 40]
    by_hand = np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1]
    assert spearman(first, second) == pytest.approx(by_hand)
    assert tokens_follow_objects({"a": 1, "b": 5, "c": 9, "unknown": 0}, {"c": 3, "a": 1, "b": 2}) == pytest.approx(1.0)


def test_the_probe_judges_combinations_that_it_never_saw():
    """Features hold colour and shape apart; each colour lacks one shape in training, and just those pairs are asked for."""
    generator = torch.Generator().manual_seed(0)
    codes = {name: torch.randn(6, 16, generator=generator) for name in ("colour", "shape")}

    def picture(colour: int, shape: int) -> torch.Tensor:
        patches = 0.3 * torch.randn(16, 32, generator=generator)
        place = int(torch.randint(16, (1,), generator=generator))
        patches[place] += 2 * torch.cat([codes["colour"][colour], codes["shape"][shape]])
        return patches

    everything = [(colour, shape) for colour in range(6) for shape in range(6)]
    seen = [pair for pair in everything if pair[0] != pair[1]] * 20
    unseen = [(index, index) for index in range(6)] * 10

    def names(pairs: list[tuple[int, int]]) -> list[dict[str, str]]:
        return [{"colour": f"c{colour}", "shape": f"s{shape}"} for colour, shape in pairs]

    probe = train_probe(torch.stack([picture(*pair) for pair in seen]), names(seen), seed=0, steps=150)
    scores = shares_right(probe.name(torch.stack([picture(*pair) for pair in unseen])), names(unseen))
    assert scores["all"] > 0.6  # 0.25 where every value competes with every other
    assert scores["all"] <= min(scores["colour"], scores["shape"])
