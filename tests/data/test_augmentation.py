"""Views of a picture: none but the whole by default, else crops and mirror images that come again with seed and key."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lavit_dist.config.base import build
from lavit_dist.config.images import AugmentationConfig, ImagesConfig, RandomCropConfig
from lavit_dist.data.augmentation import Views, crop_box
from lavit_dist.data.image import resize
from lavit_dist.data.image_batches import open_images
from lavit_dist.errors import UserError

CROPS = {"random_crop": {"min_scale": 0.1, "max_scale": 0.5}}


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def views(values, seed=0, size=16):
    return Views(build(AugmentationConfig, values), size, seed)


def test_by_default_every_view_is_the_squashed_whole(picture):
    whole = views({})
    for epoch in range(3):
        assert torch.equal(whole.make(whole.kept(picture), "a", epoch), resize(picture, 16))
        assert whole.name("a", epoch) == "a"


@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    scales=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    ratio=st.floats(1, 3),
    draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=4, max_size=4),
)
def test_crops_lie_in_the_picture_and_keep_to_area_and_ratio(width, height, scales, ratio, draws):
    config = RandomCropConfig(min_scale=scales[0], max_scale=scales[1], max_aspect_ratio=ratio)
    left, top, right, bottom = crop_box((width, height), config, draws)
    assert -1e-6 <= left < right <= width + 1e-6
    assert -1e-6 <= top < bottom <= height + 1e-6
    crop_width, crop_height = right - left, bottom - top
    assert crop_width * crop_height <= scales[1] * width * height * (1 + 1e-6) or min(crop_width, crop_height) <= 1 + 1e-6
    if 1 < crop_width < width - 1e-6 and 1 < crop_height < height - 1e-6:
        assert crop_width * crop_height >= scales[0] * width * height * (1 - 1e-6)
        assert max(crop_width / crop_height, crop_height / crop_width) <= ratio * (1 + 1e-6)


@pytest.mark.parametrize("values", [CROPS, {"horizontal_flip": True}, CROPS | {"horizontal_flip": True}])
def test_a_view_depends_on_seed_key_and_epoch_alone(picture, values):
    def made(seed, key, epoch):
        return views(values, seed).make(picture, key, epoch)

    assert torch.equal(made(1, "a", 2), made(1, "a", 2))
    for change in ("seed", "key", "epoch"):
        variants = [made(**{"seed": 1, "key": "a", "epoch": 2} | {change: f"k{n}" if change == "key" else n}) for n in range(24)]
        distinct = {variant.numpy().tobytes() for variant in variants}
        assert len(distinct) == (24 if "random_crop" in values else 2)


def test_a_mirror_image_comes_about_every_other_time(picture):
    flips = views({"horizontal_flip": True})
    whole = resize(picture, 16)
    mirrored = [torch.equal(flips.make(picture, str(key), 0), whole.flip(-1)) for key in range(400)]
    assert 150 < sum(mirrored) < 250


def test_the_smallest_crop_of_the_smallest_picture(picture):
    tiny = Image.new("RGB", (1, 1), (1, 2, 3))
    assert views(CROPS).make(tiny, "a", 0).flatten(1).unique(dim=1).flatten().tolist() == [1, 2, 3]


def test_views_take_turns_and_equal_names_are_equal_pixels(tmp_path, write_images):
    write_images("0.tar", 4)
    config = build(ImagesConfig, {"shards": str(tmp_path), "augmentation": CROPS | {"views": 3}})
    batches = open_images(config, image_size=8, global_batch_size=4, seed=0, rank=0, world_size=1)
    seen = {}
    for _ in range(9):
        batch = batches.next()
        for key, pixels in zip(batch.keys, batch.pixel_values, strict=True):
            assert torch.equal(seen.setdefault(key, pixels), pixels)
    batches.close()
    assert len(seen) == 12
    other_seed = open_images(config, image_size=8, global_batch_size=4, seed=1, rank=0, world_size=1)
    assert not set(other_seed.next().keys) & set(seen)
    other_seed.close()


@pytest.mark.parametrize("order", ["indexed", "streamed"])
def test_without_a_number_of_views_every_epoch_has_new_ones(tmp_path, write_images, order):
    write_images("0.tar", 4)
    values = {"shards": str(tmp_path), "order": order, "streams": 1, "augmentation": CROPS | {"horizontal_flip": True}}
    batches = open_images(build(ImagesConfig, values), image_size=8, global_batch_size=4, seed=0, rank=0, world_size=1)
    keys = [key for _ in range(6) for key in batches.next().keys]
    batches.close()
    assert len(set(keys)) == 24


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"random_crop": {"min_scale": 0.5, "max_scale": 0.2}}, r"random_crop\.min_scale 0\.5 and max_scale 0\.2 must lie"),
        ({"random_crop": {"min_scale": 0}}, r"random_crop\.min_scale 0"),
        ({"random_crop": {"max_aspect_ratio": 0.5}}, "must be at least 1"),
        ({"views": 3}, "has no meaning while nothing alters the pictures"),
        ({"random_crops": {}}, "unknown key"),
    ],
)
def test_mistakes_are_told_in_a_sentence(values, message):
    with pytest.raises(UserError, match=message):
        build(ImagesConfig, {"shards": "x", "augmentation": values})
