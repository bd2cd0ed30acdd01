"""Streams through tars: who reads what when, whatever happens to the tars."""

import itertools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.data.quarantine import QuarantineLog, SampleError
from lavit_dist.data.shard_list import list_tars
from lavit_dist.data.shard_store import ShardStore
from lavit_dist.data.shard_stream import ShardStream, ShardWalk, StreamPosition
from lavit_dist.errors import UserError


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def open_stream(tmp_path, pool):
    """`open_stream(streams, number)`: a reader of the tars in the folder, and its log."""

    def make(streams=1, number=0, seed=0):
        shards = list_tars(str(tmp_path), {}, "images.shards")
        store = ShardStore(shards, cache_folder=None, cache_bytes=1, attempts=1, open_at_a_time=2)
        log = QuarantineLog()
        return ShardStream(number, ShardWalk(len(shards), streams, seed), store, pool, log.add), log

    return make


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    streams=st.integers(1, 12),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 50),
)
def test_the_streams_together_go_through_every_sample_once_per_epoch(sizes, streams, seed, epoch):
    walk = ShardWalk(len(sizes), streams, seed)
    seen = Counter()
    for stream in range(streams):
        for visit in itertools.takewhile(lambda visit: visit.epoch == epoch, walk.visits(stream, epoch)):
            seen.update((visit.shard, int(sample)) for sample in walk.samples(visit, sizes[visit.shard]))
    assert seen == Counter((shard, sample) for shard, size in enumerate(sizes) for sample in range(size))


@given(shards=st.integers(1, 12), streams=st.integers(1, 12), stream=st.integers(0, 11), start=st.integers(0, 30))
def test_visits_begun_anywhere_are_those_of_the_walk_from_the_beginning(shards, streams, stream, start):
    walk = ShardWalk(shards, streams, 5)
    visits = list(itertools.islice(walk.visits(stream % streams), start + 5))
    assert list(itertools.islice(walk.visits(stream % streams, visits[start].epoch, visits[start].ordinal), 5)) == visits[start:]


@given(samples=st.integers(1, 5), streams=st.integers(1, 12))
def test_with_more_streams_than_samples_each_stream_still_comes_to_a_sample(samples, streams):
    walk = ShardWalk(1, streams, 0)
    for stream in range(streams):
        taken = [len(walk.samples(visit, samples)) for visit in itertools.islice(walk.visits(stream), streams)]
        assert sum(taken) == samples


def test_epochs_shuffle_tars_and_samples_anew(write_images, open_stream):
    for number in range(5):
        write_images(f"{number}.tar", 6)
    stream, _ = open_stream()
    epochs = [[stream.next().key for _ in range(30)] for _ in range(4)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert len({tuple(dict.fromkeys(key.split("/")[0] for key in epoch)) for epoch in epochs}) > 1
    other, _ = open_stream(seed=1)
    assert [other.next().key for _ in range(30)] != epochs[0]


@pytest.mark.parametrize("streams", [1, 2, 7])
def test_a_stream_restored_at_any_sample_goes_on_as_if_it_had_not_stopped(write_images, open_stream, streams):
    for number, count in enumerate([4, 1, 3]):
        write_images(f"{number}.tar", count)
    stream, _ = open_stream(streams, streams - 1)
    positions, keys = [stream.position], []
    for _ in range(25):
        keys.append(stream.next().key)
        positions.append(stream.position)
    for taken in range(25):
        again, _ = open_stream(streams, streams - 1)
        again.restore(positions[taken])
        assert [again.next().key for _ in range(25 - taken)] == keys[taken:]


def test_tars_that_are_cut_or_empty_or_none_are_passed_over_and_written_down(tmp_path, write_tar, write_images, open_stream):
    write_images("good.tar", 3)
    write_tar([], "empty.tar")
    (tmp_path / "junk.tar").write_bytes(b"no tar at all" * 100)
    cut = write_images("cut.tar", 4)
    cut.write_bytes(cut.read_bytes()[: 2 * 1536 + 100])
    write_tar([("a.txt", b"a caption alone"), ("b.jpg", b"x"), ("b.jpg", b"y")], "captions.tar")
    stream, log = open_stream()
    keys = {stream.next().key for _ in range(20)}
    assert keys == {f"good.tar/00{n}" for n in range(3)} | {f"cut.tar/00{n}" for n in range(2)}
    found = {key: record.reason for key, record in log.records.items()}
    assert found["empty.tar"] == "no_images"
    assert found["junk.tar"] == "unreadable_tar"
    assert found["cut.tar"] == "truncated_tar"
    assert found["captions.tar/a"] == "missing_image"
    assert found["captions.tar/b"] == "duplicate_member"
    assert found["captions.tar"] == "no_images"


def test_a_tar_that_goes_away_between_epochs_is_passed_over(tmp_path, write_images, open_stream):
    write_images("a.tar", 2)
    write_images("b.tar", 2)
    stream, log = open_stream()
    assert {stream.next().key[:5] for _ in range(4)} == {"a.tar", "b.tar"}
    (tmp_path / "a.tar").unlink()
    for _ in range(10):
        stream.next()
    assert {stream.next().key[:5] for _ in range(10)} == {"b.tar"}
    assert log.records["a.tar"].reason == "unreadable_tar"


def test_a_tar_cut_while_it_is_read_costs_its_samples_alone(tmp_path, write_images, open_stream):
    path = write_images("a.tar", 3)
    stream, _ = open_stream()
    sample = stream.next()
    with path.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(SampleError, match=r"truncated_tar: a\.tar ends within"):
        sample.read()


def test_nothing_but_bad_tars_ends_in_a_sentence(tmp_path, open_stream):
    for number in range(3):
        (tmp_path / f"{number}.tar").write_bytes(b"junk")
    stream, _ = open_stream()
    with pytest.raises(UserError, match="60 tars in succession held no image"):
        stream.next()


def test_nothing_but_bad_pictures_ends_in_a_sentence(write_images, open_stream):
    write_images("a.tar", 3)
    stream, _ = open_stream()

    def reject_all():
        while True:
            stream.reject(stream.next())

    with pytest.raises(UserError, match="20 tars in succession held no image"):
        reject_all()


def test_many_tiny_tars_ahead_of_their_decoding_are_no_reason_to_give_up(write_images, open_stream):
    write_images("a.tar", 1)
    stream, _ = open_stream()
    samples = [stream.next() for _ in range(200)]
    for sample in samples:
        stream.accept(sample)
    assert stream.position == StreamPosition(199, 0, 1)
