"""Reading tars as they are found."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.data.pairs import read_pairs
from lavit_dist.data.quarantine import Quarantined, read_quarantine, write_quarantine
from lavit_dist.data.tar_reader import FileLocation, index_shard, read_bytes


def reasons(quarantined):
    return {(record.key, record.reason) for record in quarantined}


def test_files_are_found_where_the_index_says(write_tar, jpeg):
    path = write_tar([("x/a.JPG", jpeg()), ("x/a.txt", b"one"), ("b.webp", b"2"), ("b.json", b"{}")])
    index = index_shard(path)
    assert [sample.key for sample in index.samples] == ["x/a", "b"]
    assert index.quarantined == []
    assert read_bytes(index.samples[0].files["jpg"]) == jpeg()
    assert read_bytes(index.samples[0].files["txt"]) == b"one"
    assert read_bytes(index.samples[1].image) == b"2"


def test_doubled_and_missing_files_cost_only_their_own_sample(write_tar):
    members = [
        ("a.jpg", b"1"),
        ("a.txt", b"a"),
        ("b.jpg", b"2"),
        ("b.jpg", b"3"),
        ("b.txt", b"b"),
        ("c.txt", b"c"),
        ("d.jpg", b"4"),
    ]
    index = index_shard(write_tar([*members, ("README", b"no suffix"), ("e.jpg", b"5"), ("e.txt", b"e")]))
    assert [sample.key for sample in index.samples] == ["a", "e"]
    assert reasons(index.refused) == {
        ("b", "duplicate_member"),
        ("c", "missing_image"),
        ("d", "missing_caption"),
        ("README", "odd_name"),
    }
    assert index.damage is None


def test_a_tar_cut_anywhere_gives_its_whole_samples_and_says_that_it_is_cut(write_tar, tmp_path):
    members = [(f"{number}.{suffix}", b"x" * size) for number in range(4) for suffix, size in (("jpg", 700), ("txt", 5))]
    whole = write_tar(members).read_bytes()
    sample_bytes = 512 + 1024 + 512 + 512
    for cut in range(0, 4 * sample_bytes + 512, 256):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:cut])
        index = index_shard(path)
        complete = [number for number in range(4) if cut >= number * sample_bytes + 512 + 1024 + 512 + 5]
        assert [sample.key for sample in index.samples] == [str(number) for number in complete]
        assert {record.reason for record in index.quarantined} & {
            "truncated_tar",
            "unreadable_tar",
        } or cut >= 4 * sample_bytes + 512
        for sample in index.samples:
            assert len(read_bytes(sample.image)) == 700


def test_a_damaged_header_in_the_middle_is_told_from_the_end(write_tar):
    path = write_tar([("a.jpg", b"1"), ("a.txt", b"a"), ("b.jpg", b"2"), ("b.txt", b"b")])
    data = bytearray(path.read_bytes())
    data[2048:2560] = b"\xff" * 512
    path.write_bytes(data)
    index = index_shard(path)
    assert [sample.key for sample in index.samples] == ["a"]
    assert ("00000.tar", "truncated_tar") in reasons(index.quarantined)


@given(junk=st.binary(max_size=2000))
def test_no_bytes_raise(tmp_path_factory, junk):
    path = tmp_path_factory.mktemp("junk") / "00000.tar"
    path.write_bytes(junk)
    index = index_shard(path)
    assert index.samples == []
    assert index.quarantined or junk.startswith(bytes(512))


def test_a_shard_that_shrank_since_it_was_indexed_is_noticed(write_tar):
    path = write_tar([("a.jpg", b"1")])
    with pytest.raises(Exception, match="truncated_tar"):
        read_bytes(FileLocation(str(path), 512, 10**6))


def test_captions_come_from_the_json_or_else_the_txt(write_tar):
    good = [("a.jpg", b""), ("a.txt", b"first"), ("a.json", b'{"captions": [" first ", "", "second"], "score": 1}')]
    plain = [("b.jpg", b""), ("b.txt", "d\u00e9j\u00e0\n".encode()), ("c.png", b""), ("c.json", b'{"caption": "from LAION"}')]
    bad = [
        ("d.jpg", b""),
        ("d.txt", b" \n"),
        ("e.jpg", b""),
        ("e.txt", b"\xff\xfe"),
        ("f.jpg", b""),
        ("f.json", b"{"),
        ("g.jpg", b""),
    ]
    worse = [
        ("g.json", b"[1]"),
        ("h.jpg", b""),
        ("h.json", b'{"captions": "one"}'),
        ("i.jpg", b""),
        ("i.json", b'{"captions": ["\\ud800"]}'),
    ]
    pairs, quarantined = read_pairs(write_tar(good + plain + bad + worse))
    assert {pair.key: pair.captions for pair in pairs} == {"a": ("first", "second"), "b": ("d\u00e9j\u00e0",), "c": ("from LAION",)}
    assert pairs[0].metadata["score"] == 1
    assert reasons(quarantined) == {
        ("d", "empty_caption"),
        ("e", "malformed_caption"),
        ("f", "malformed_metadata"),
        ("g", "malformed_metadata"),
        ("h", "malformed_metadata"),
        ("i", "malformed_caption"),
    }


def test_a_quarantine_file_reads_back_as_it_was_written(tmp_path):
    records = [
        Quarantined("caf\u00e9\udc80", "ingest", "image_bomb", 'two\nlines and "quotes"', "ab" * 32),
        Quarantined("b", "ingest", "x", "y"),
    ]
    write_quarantine(tmp_path / "q.jsonl", records)
    assert read_quarantine(tmp_path / "q.jsonl") == records
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 2
