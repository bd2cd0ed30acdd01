"""The procedural set: what is held out stays out, captions tell the truth, and a scene is a pure function of its place."""

import io
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lavit_dist.data.shapes import ATTRIBUTES, COLOURS, MAX_OBJECTS, SHAPES, TINTS, make_scene_maker
from lavit_dist.data.shapes_picture import draw_scene, encode_jpeg

PAIR = ("colour", "shape")
attributes = st.lists(st.sampled_from(sorted(ATTRIBUTES)), min_size=2, max_size=3, unique=True).map(tuple)


@given(seed=st.integers(0, 10**6), names=attributes, fraction=st.floats(0.02, 0.5))
def test_every_combination_is_in_one_split_and_every_value_stays_common_in_training(seed, names, fraction):
    maker = make_scene_maker(seed, names, fraction)
    every = set(itertools.product(*(ATTRIBUTES[name] for name in names)))
    train, heldout = ({tuple(combination[name] for name in names) for combination in part} for part in (maker.train, maker.heldout))
    assert train | heldout == every
    if round(fraction * len(every)):
        assert train.isdisjoint(heldout)
        assert len(heldout) == round(fraction * len(every))
    for place, name in enumerate(names):
        counts = Counter(combination[place] for combination in train)
        expected = len(train) / len(ATTRIBUTES[name])
        assert min(counts[value] for value in ATTRIBUTES[name]) >= max(1, expected - 2)


def test_by_default_five_of_the_pairs_are_held_out_and_spread():
    maker = make_scene_maker(0, PAIR, 1 / 6)
    assert len(maker.heldout) == 5
    assert len({combination["colour"] for combination in maker.heldout}) == 5
    assert max(Counter(combination["shape"] for combination in maker.heldout).values()) <= 2


def test_held_out_pairs_never_are_the_main_object_in_training_and_always_are_in_the_other_split():
    maker = make_scene_maker(5, PAIR, 1 / 6)
    held = {(combination["colour"], combination["shape"]) for combination in maker.heldout}
    train = [maker.scene("train", index).things[0] for index in range(400)]
    heldout = [maker.scene("heldout", index).things[0] for index in range(80)]
    assert held.isdisjoint({(main.colour, main.shape) for main in train})
    assert Counter((main.colour, main.shape) for main in heldout) == dict.fromkeys(held, 80 // len(held))
    assert {main.colour for main in train} == set(COLOURS)
    assert {main.shape for main in train} == set(SHAPES)


@given(seed=st.integers(0, 10**6), index=st.integers(0, 10**7), split=st.sampled_from(["train", "heldout"]))
def test_objects_lie_apart_within_the_picture_and_the_main_one_is_clearly_the_largest(seed, index, split):
    things = make_scene_maker(seed, PAIR, 1 / 6).scene(split, index).things
    assert 1 <= len(things) <= MAX_OBJECTS
    for thing in things:
        assert all(thing.size / 2 < centre < 1 - thing.size / 2 for centre in (thing.x, thing.y))
    for one, other in itertools.combinations(things, 2):
        assert max(abs(one.x - other.x), abs(one.y - other.y)) > (one.size + other.size) / 2
    assert all(things[0].size > 1.6 * thing.size for thing in things[1:])


@given(seed=st.integers(0, 10**6), index=st.integers(0, 10**7))
def test_captions_name_the_main_object_first_and_the_full_one_names_every_object_with_its_number(seed, index):
    scene = make_scene_maker(seed, PAIR, 1 / 6).scene("train", index)
    main = scene.things[0]
    for caption in scene.captions:
        words = caption.replace(",", "").split()
        named = [
            (a, b)
            for a, b in itertools.pairwise(words)
            if a in COLOURS and b.removesuffix("es").removesuffix("s") in (*SHAPES, "cros")
        ]
        assert named[0] == (main.colour, main.shape)
        assert len(words) <= 25
    counted = Counter((thing.colour, thing.shape) for thing in scene.things[1:])
    for (colour, shape), number in counted.items():
        plural = "" if number == 1 else "es" if shape == "cross" else "s"
        assert f"{['', 'a', 'two', 'three'][number]} small {colour} {shape}{plural}" in scene.captions[0]
    assert scene.captions[0].count("small") == len(counted)


def test_the_vocabulary_is_small_and_closed():
    maker = make_scene_maker(1, PAIR, 0)
    words = {
        word
        for index in range(3000)
        for caption in maker.scene("train", index).captions
        for word in caption.replace(",", "").split()
    }
    assert len(words) <= 60


def test_a_scene_does_not_depend_on_what_was_made_before_it():
    maker = make_scene_maker(2, PAIR, 1 / 6)
    forwards = [encode_jpeg(draw_scene(maker.scene("train", index), 64)) for index in range(20)]
    again = make_scene_maker(2, PAIR, 1 / 6)
    backwards = [encode_jpeg(draw_scene(again.scene("train", index), 64)) for index in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert len(set(forwards)) == 20
    assert maker.scene("heldout", 0) != maker.scene("train", 0)


@pytest.mark.parametrize("image_size", [64, 128])
def test_the_picture_shows_what_the_metadata_says(image_size):
    """In the JPEG that is written, the pixel at each object's centre has its colour, and the corners have none of them."""
    maker = make_scene_maker(3, PAIR, 1 / 6)
    palette = np.array(list(COLOURS.values()))
    for index in range(60):
        scene = maker.scene("train", index)
        pixels = np.asarray(Image.open(io.BytesIO(encode_jpeg(draw_scene(scene, image_size)))).convert("RGB")).astype(int)
        assert pixels.shape == (image_size, image_size, 3)
        for thing in scene.metadata(image_size)["objects"]:
            distances = np.abs(palette - pixels[round(thing["y"]), round(thing["x"])]).sum(axis=1)
            assert list(COLOURS)[int(distances.argmin())] == thing["colour"]
        assert np.abs(pixels[0, 0] - np.array(TINTS[scene.tint])).max() < 70
