"""The order of pairs: what a batch holds depends on data, seed and step alone."""

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.data.image import preprocess
from lavit_dist.data.pair_batches import PairBatches, PairDataset, epoch_order
from lavit_dist.data.pairs import list_shards
from lavit_dist.data.picture import decode_image
from lavit_dist.errors import UserError

SIZE = 8
PAIRS = 12


@pytest.fixture
def dataset(tmp_path, write_tar, jpeg):
    members = []
    for number in range(PAIRS):
        captions = f'{{"captions": ["{number} one", "{number} two", "{number} three"]}}'.encode()
        members += [(f"k{number}.jpg", jpeg((number * 20, 0, 0))), (f"k{number}.json", captions)]
    write_tar(members[:14], "00000.tar")
    write_tar(members[14:], "00001.tar")
    return PairDataset(list_shards(tmp_path), SIZE)


@given(size=st.integers(1, 300), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_an_epoch_visits_everything_once(size, seed, epoch):
    assert sorted(epoch_order(size, seed, epoch)) == list(range(size))


def test_epochs_and_seeds_have_different_orders():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_every_epoch_of_batches_covers_the_set(dataset):
    batches = PairBatches(dataset, global_batch_size=5, seed=3)
    keys = [key for step in range(12) for key in batches.batch(step).keys]
    for epoch in range(5):
        assert sorted(keys[epoch * PAIRS : (epoch + 1) * PAIRS]) == sorted(sample.key for sample in dataset.samples)


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_the_union_over_ranks_is_the_global_batch_and_asking_again_changes_nothing(dataset, world_size):
    whole = PairBatches(dataset, global_batch_size=6, seed=1)
    ranks = [PairBatches(dataset, 6, 1, rank, world_size) for rank in range(world_size)]
    for step in (7, 0, 3, 7):
        expected = whole.batch(step)
        parts = [batches.batch(step) for batches in ranks]
        assert [parts[i % world_size].keys[i // world_size] for i in range(6)] == expected.keys
        assert [parts[i % world_size].captions[i // world_size] for i in range(6)] == expected.captions
        assert torch.equal(
            torch.stack([parts[i % world_size].pixel_values[i // world_size] for i in range(6)]), expected.pixel_values
        )


def test_a_pair_takes_its_captions_in_turn_over_the_epochs(dataset):
    batches = PairBatches(dataset, global_batch_size=PAIRS, seed=0)
    seen = {caption for epoch in range(20) for caption in batches.batch(epoch).captions}
    assert len(seen) == 3 * PAIRS
    for key, caption in zip(batches.batch(4).keys, batches.batch(4).captions, strict=True):
        assert caption.startswith(key[1:] + " ")


@pytest.mark.parametrize("cache_bytes", [0, 5 * 3 * SIZE**2, 1 << 20])
def test_pixels_are_the_preprocessed_picture_with_or_without_the_cache(dataset, jpeg, cache_bytes):
    shards = sorted({Path(sample.image_location.shard) for sample in dataset.samples})
    cached = PairDataset(shards, SIZE, cache_bytes=cache_bytes)
    for _ in range(2):
        for index in range(PAIRS):
            assert torch.equal(cached.pixels(index), preprocess(decode_image(jpeg((index * 20, 0, 0))), SIZE))


def test_an_unreadable_picture_gives_way_to_the_next_and_is_named_once(write_tar, jpeg, caplog):
    members = [
        (f"{n}.{suffix}", data) for n in range(6) for suffix, data in (("jpg", jpeg() if n % 3 else b"<html>"), ("txt", b"x"))
    ]
    batches = PairBatches(PairDataset([write_tar(members)], SIZE), global_batch_size=6, seed=0)
    with caplog.at_level(logging.WARNING):
        first, second = batches.batch(0), batches.batch(1)
    assert {*first.keys, *second.keys} == {"1", "2", "4", "5"}
    assert batches.batch(0).keys == first.keys
    assert {key: record.reason for key, record in batches.quarantined.items()} == {"0": "web_page", "3": "web_page"}
    assert len(caplog.records) == 2


def test_a_set_without_one_readable_picture_is_an_error_and_no_endless_loop(write_tar):
    batches = PairBatches(PairDataset([write_tar([("a.jpg", b"x"), ("a.txt", b"x")])], SIZE), 1, 0)
    with pytest.raises(UserError, match=r"None of the 1 pictures .*unreadable_image"):
        batches.batch(0)


def test_mistakes_are_told_in_a_sentence(tmp_path, dataset, write_tar):
    with pytest.raises(UserError, match=r"does not exist and so holds no \*\.tar"):
        list_shards(tmp_path / "absent")
    write_tar([], "pairs/train/00000.tar")
    with pytest.raises(UserError, match=r"name one of its splits: .*pairs/train"):
        list_shards(tmp_path / "pairs")
    with pytest.raises(UserError, match="global_batch_size 7 is not a positive multiple of the 2"):
        PairBatches(dataset, 7, 0, 0, 2)
    with pytest.raises(UserError, match=r"holds a usable pair .*missing_caption"):
        PairDataset([write_tar([("a.jpg", b"")], "bad.tar")], SIZE)
