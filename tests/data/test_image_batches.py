"""Batches of images: what they hold depends on the tars and the seed, never on the number of ranks, threads or stops."""

import json
import shutil
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lavit_dist.config.base import build
from lavit_dist.config.images import ImagesConfig
from lavit_dist.data.image import preprocess
from lavit_dist.data.image_batches import merge_states, open_images
from lavit_dist.data.picture import decode_image
from lavit_dist.errors import UserError

SIZE = 8
BATCH = 8
ORDERS = ["indexed", "streamed"]


@pytest.fixture
def tars(tmp_path, write_images):
    """Uneven tars, some of whose pictures are none."""
    for number, (count, bad) in enumerate([(9, {2}), (4, set()), (1, {0}), (6, {0, 5}), (3, set())]):
        write_images(f"tars/{number:05d}.tar", count, bad)
    return str(tmp_path / "tars")


def open_ranks(shards, order="streamed", world_size=1, seed=3, batch=BATCH, **values):
    """The batches of every rank."""
    config = build(ImagesConfig, {"shards": shards, "order": order, "streams": 4, "decode_threads": 2, **values})
    return [
        open_images(config, image_size=SIZE, global_batch_size=batch, seed=seed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]


def global_batch(ranks):
    """Keys and pixels of the next global batch in their order."""
    batches = [rank.next() for rank in ranks]
    found = {
        position: (key, pixels)
        for batch in batches
        for position, key, pixels in zip(batch.positions, batch.keys, batch.pixel_values, strict=True)
    }
    assert sorted(found) == list(range(sum(len(batch.keys) for batch in batches)))
    return [found[position] for position in range(len(found))]


def take(ranks, count):
    """Keys of the next global batches; the batches are closed after it."""
    taken = [[key for key, _ in global_batch(ranks)] for _ in range(count)]
    close(ranks)
    return taken


def close(ranks):
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_union_over_ranks_is_the_same_for_every_number_of_ranks(tars, order, world_size):
    one, many = open_ranks(tars, order), open_ranks(tars, order, world_size)
    for _ in range(12):
        expected, found = global_batch(one), global_batch(many)
        assert [key for key, _ in found] == [key for key, _ in expected]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(expected, found, strict=True))
    close(one + many)


@pytest.mark.parametrize("order", ORDERS)
def test_a_run_stopped_after_any_step_goes_on_with_any_number_of_ranks(tars, order):
    straight = take(open_ranks(tars, order), 12)
    for stop in range(9):
        for before, after in ((1, 2), (2, 4), (4, 1), (2, 2)):
            ranks = open_ranks(tars, order, before)
            assert [[key for key, _ in global_batch(ranks)] for _ in range(stop)] == straight[:stop]
            state = json.loads(json.dumps(merge_states(rank.state_dict() for rank in ranks)))
            close(ranks)
            resumed = open_ranks(tars, order, after)
            for rank in resumed:
                rank.load_state_dict(state)
            assert merge_states(rank.state_dict() for rank in resumed) == state
            assert take(resumed, 3) == straight[stop : stop + 3]


@pytest.mark.parametrize("order", ORDERS)
def test_the_state_is_that_of_the_batches_returned_and_loading_it_goes_back_to_it(tars, order):
    (batches,) = open_ranks(tars, order, prefetch_batches=3)
    first = batches.next().keys
    state = batches.state_dict()
    ahead = [batches.next().keys for _ in range(5)]
    batches.load_state_dict(state)
    assert [batches.next().keys for _ in range(5)] == ahead
    assert ahead[0] != first
    batches.close()


@pytest.mark.parametrize("order", ORDERS)
@given(
    counts=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    bad=st.sets(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=6),
    streams=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 1000),
    stop=st.integers(0, 4),
)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_set_gives_the_same_batches_straight_or_resumed_by_other_ranks(
    tmp_path, write_images, order, counts, bad, streams, seed, stop
):
    shutil.rmtree(tmp_path / "any", ignore_errors=True)
    usable = 0
    for number, count in enumerate(counts):
        wrong = {place for shard, place in bad if shard == number and place < count}
        write_images(f"any/{number}.tar", count, wrong)
        usable += count - len(wrong)
    options = {"order": order, "streams": streams, "seed": seed, "batch": 4}
    shards = str(tmp_path / "any")
    ranks = open_ranks(shards, **options)
    if usable == 0:
        with pytest.raises(UserError, match=r"can be decoded|can be used"):
            global_batch(ranks)
        close(ranks)
        return
    straight = take(ranks, 6)
    ranks = open_ranks(shards, world_size=streams, **options)
    assert [[key for key, _ in global_batch(ranks)] for _ in range(stop)] == straight[:stop]
    state = merge_states(rank.state_dict() for rank in ranks)
    close(ranks)
    resumed = open_ranks(shards, **options)
    resumed[0].load_state_dict(state)
    assert take(resumed, 6 - stop) == straight[stop:]


@pytest.mark.parametrize("order", ORDERS)
def test_batches_hold_the_preprocessed_pictures_and_every_usable_one_comes(tars, jpeg, order):
    ranks = open_ranks(tars, order)
    seen = {}
    for _ in range(30):
        for key, pixels in global_batch(ranks):
            assert torch.equal(seen.setdefault(key, pixels), pixels)
    assert len(seen) == 19
    (batches,) = ranks
    assert {key: record.reason for key, record in batches.quarantined.items()} == dict.fromkeys(
        ["00000.tar/002", "00002.tar/000", "00003.tar/000", "00003.tar/005"], "web_page"
    )
    assert batches.quarantined_counts == {"web_page": 4}
    assert batches.wait_seconds > 0
    batch = batches.next()
    assert batch.pixel_values.dtype == torch.float32
    assert batch.pixel_values.shape == (BATCH, 3, SIZE, SIZE)
    batches.close()


@pytest.mark.parametrize("order", ORDERS)
def test_pixels_are_the_papers_squash(tmp_path, write_tar, jpeg, order):
    data = jpeg((10, 200, 30), (17, 9))
    write_tar([("a.jpg", data)])
    (batches,) = open_ranks(str(tmp_path), order, batch=4)
    assert torch.equal(batches.next().pixel_values, preprocess(decode_image(data), SIZE).expand(4, -1, -1, -1))
    batches.close()


@pytest.mark.parametrize("order", ORDERS)
def test_the_first_epoch_shows_every_picture_once(tmp_path, write_images, order):
    for number in range(4):
        write_images(f"{number}.tar", 6)
    keys = [key for batch in take(open_ranks(str(tmp_path), order), 3) for key in batch]
    assert len(keys) == len(set(keys)) == 24


@pytest.mark.parametrize("order", ORDERS)
def test_pixel_cache_threads_and_prefetch_change_nothing(tars, order):
    expected = take(open_ranks(tars, order), 6)
    for values in ({"pixel_cache_bytes": 0}, {"pixel_cache_bytes": 1000}, {"decode_threads": 1}, {"prefetch_batches": 1}):
        assert take(open_ranks(tars, order, **values), 6) == expected


def test_missing_tars_of_a_list_are_passed_over_and_written_down(tars):
    ranks = open_ranks([f"{tars}/{{00000..00007}}.tar"])
    assert len({key for _ in range(12) for key, _ in global_batch(ranks)}) == 19
    assert ranks[0].quarantined["00006.tar"].reason == "missing_tar"
    close(ranks)


def test_a_set_that_changed_is_refused_with_the_tar_that_did(tmp_path, tars, write_images):
    for order in ORDERS:
        ranks = open_ranks(tars, order)
        global_batch(ranks)
        state = ranks[0].state_dict()
        close(ranks)
        write_images("tars/00003.tar", 12)
        changed = open_ranks(tars, order)
        with pytest.raises(UserError, match=r"differs first from|00003\.tar"):
            changed[0].load_state_dict(state)
        close(changed)
        write_images("tars/00003.tar", 6, {0, 5})
        other_seed = open_ranks(tars, order, seed=9)
        with pytest.raises(UserError, match="read with seed 3 before and now with seed 9"):
            other_seed[0].load_state_dict(state)
        close(other_seed)


def test_mistakes_are_told_in_a_sentence(tmp_path, tars, write_images):
    with pytest.raises(UserError, match=r"images\.streams 4 is not a multiple of the 3 data-parallel ranks"):
        open_ranks(tars, world_size=3, batch=12)
    with pytest.raises(UserError, match=r"images\.streams 4 does not divide global_batch_size 6"):
        open_ranks(tars, batch=6)
    with pytest.raises(UserError, match="global_batch_size 8 is not a multiple of the 3"):
        open_ranks(tars, "indexed", world_size=3)
    ranks = open_ranks(tars, world_size=2)
    with pytest.raises(UserError, match="lacks stream 1 of 4"):
        ranks[1].load_state_dict(ranks[0].state_dict())
    close(ranks)
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "0.tar").write_bytes(b"junk")
    with pytest.raises(UserError, match="holds a usable image"):
        open_ranks(str(tmp_path / "junk"), "indexed")
    (batches,) = open_ranks(str(tmp_path / "junk"))
    for _ in range(2):  # it stays an error, and nothing hangs
        with pytest.raises(UserError, match="held no image that can be used"):
            batches.next()
    batches.close()
    write_images("html/0.tar", 3, {0, 1, 2})
    for order, message in (("indexed", "None of the 3 images"), ("streamed", "held no image that can be used")):
        (batches,) = open_ranks(str(tmp_path / "html"), order)
        with pytest.raises(UserError, match=message):
            batches.next()
        batches.close()


@pytest.mark.parametrize("order", ORDERS)
def test_closing_ends_all_threads(tars, order):
    before = threading.active_count()
    ranks = open_ranks(tars, order, world_size=2)
    global_batch(ranks)
    assert threading.active_count() > before
    close(ranks)
    assert threading.active_count() == before
