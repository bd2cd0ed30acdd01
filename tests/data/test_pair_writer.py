"""Written pairs read back, the same pairs give the same bytes, and nothing is lost at the borders of shards."""

import pytest

from lavit_dist.data.pair_writer import EncodedPair, PairWriter
from lavit_dist.data.pairs import list_shards, read_pairs
from lavit_dist.data.quarantine import Quarantined, read_quarantine
from lavit_dist.data.tar_reader import read_bytes


def pair(number):
    return EncodedPair(
        f"k{number}", bytes([number]) * 700, "png", (f"caption {number}", "\u00fcber"), {"score": number, "\u00e4": "\u00f6"}
    )


def write(folder, outcomes, samples_per_shard):
    writer = PairWriter(folder, samples_per_shard)
    for outcome in outcomes:
        writer.add(outcome)
    writer.close()
    return writer


@pytest.mark.parametrize(("samples", "shards"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_what_is_written_is_read_back_in_order(tmp_path, samples, shards):
    writer = write(tmp_path, map(pair, range(samples)), 4)
    paths = list_shards(tmp_path)
    assert [path.name for path in paths] == [f"{number:05d}.tar" for number in range(shards)]
    found = [sample for path in paths for sample in read_pairs(path)[0]]
    assert [sample.key for sample in found] == [f"k{number}" for number in range(samples)]
    for number, sample in enumerate(found):
        assert read_bytes(sample.image_location) == pair(number).image
        assert sample.captions == pair(number).captions
        assert sample.metadata == pair(number).metadata | {"captions": list(pair(number).captions)}
    assert (writer.samples, writer.captions, writer.shards) == (samples, 2 * samples, shards)


def test_the_same_pairs_give_the_same_bytes(tmp_path):
    for folder in ("one", "two"):
        write(tmp_path / folder, map(pair, range(5)), 3)
    for name in ("00000.tar", "00001.tar", "00000.quarantine.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert not list(tmp_path.glob("*/.*"))


def test_records_lie_beside_the_shard_that_was_being_filled(tmp_path):
    bad = [Quarantined(f"bad{number}", "ingest", "image_bomb", "big") for number in range(3)]
    writer = write(tmp_path, [bad[0], pair(0), bad[1], pair(1), pair(2), bad[2]], 2)
    assert read_quarantine(tmp_path / "00000.quarantine.jsonl") == bad[:2]
    assert read_quarantine(tmp_path / "00001.quarantine.jsonl") == bad[2:]
    assert writer.reasons == {"image_bomb": 3}


def test_a_split_of_refusals_has_records_and_no_tar(tmp_path):
    write(tmp_path, [Quarantined("a", "ingest", "image_bomb", "big")], 2)
    assert [path.name for path in tmp_path.iterdir()] == ["00000.quarantine.jsonl"]
