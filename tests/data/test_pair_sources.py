"""Pictures and captions in the forms that people keep them."""

import json
import os
from pathlib import Path

import pytest

from lavit_dist.data.pair_check import check_pair
from lavit_dist.data.pair_sources import Columns, read_source
from lavit_dist.data.quarantine import SampleError
from lavit_dist.errors import UserError


def listed(source, **columns):
    pairs, quarantined = read_source(source, Columns(**columns))
    return {pair.key: (pair.name, pair.captions) for pair in pairs}, {(record.key, record.reason) for record in quarantined}


def test_a_folder_pairs_pictures_with_the_txt_beside_them(tmp_path, jpeg):
    (tmp_path / "deep").mkdir()
    for name in ("a.jpg", "b.PNG", "deep/a.webp", "alone.jpg", "latin.jpg"):
        (tmp_path / name).write_bytes(jpeg())
    (tmp_path / "a.txt").write_text("first\nsecond\n")
    (tmp_path / "b.txt").write_text("\ufeffwith a mark")
    (tmp_path / "deep" / "a.txt").write_text("deep")
    (tmp_path / "lonely.txt").write_text("no picture")
    (tmp_path / "latin.txt").write_bytes("d\u00e9j\u00e0".encode("latin-1"))
    pairs, refused = listed(tmp_path)
    assert pairs == {"a": ("a.jpg", ("first", "second")), "b": ("b.PNG", ("with a mark",)), "deep/a": ("deep/a.webp", ("deep",))}
    assert refused == {("alone.jpg", "missing_caption"), ("lonely.txt", "missing_image"), ("latin.jpg", "malformed_caption")}


@pytest.mark.parametrize(("name", "separator"), [("pairs.csv", ","), ("pairs.tsv", "\t")])
def test_rows_of_a_table_that_share_a_picture_become_one_pair(tmp_path, name, separator):
    rows = [
        ("file_name", "caption", "licence"),
        ("x/1.jpg", '"one, of two"', "CC"),
        ("x/1.jpg", "two", "CC"),
        ("2.jpg", "other", ""),
    ]
    rows += [("", "no picture", ""), ("http://a/b.jpg", "an address", "")]
    (tmp_path / name).write_text("\n".join(separator.join(row) for row in rows))
    pairs, refused = listed(tmp_path / name)
    assert pairs == {"1": ("x/1.jpg", ("one, of two", "two")), "2": ("2.jpg", ("other",))}
    assert refused == {("line 5", "missing_image"), ("line 6", "missing_image")}
    found, _ = read_source(tmp_path, Columns())
    assert found[0].image == tmp_path / "x" / "1.jpg"
    assert found[0].metadata == {"licence": "CC"}


def test_json_lines_take_lists_and_strings_and_name_bad_lines(tmp_path):
    lines = [{"key": 7, "path": "a.jpg", "text": ["one", "two"]}, {"key": "b", "path": "b.jpg", "text": "three"}, {"path": "c.jpg"}]
    text = "\n".join([*map(json.dumps, lines), "{oops", "[1]", "", json.dumps({"path": "d.jpg", "text": 5})])
    (tmp_path / "c.jsonl").write_text(text)
    pairs, refused = listed(tmp_path / "c.jsonl")
    assert pairs == {"7": ("a.jpg", ("one", "two")), "b": ("b.jpg", ("three",)), "c": ("c.jpg", ("",))}
    assert refused == {("line 4", "malformed_row"), ("line 5", "malformed_row"), ("line 7", "malformed_row")}


def test_columns_can_be_named(tmp_path):
    (tmp_path / "t.csv").write_text("pic,said,id\n1.jpg,hello,first\n")
    pairs, _ = listed(tmp_path / "t.csv", image="pic", caption="said", key="id")
    assert pairs == {"first": ("1.jpg", ("hello",))}


def test_a_folder_of_tars_is_read_through_the_tolerant_reader(tmp_path, write_tar, jpeg):
    path = write_tar([("a.jpg", jpeg()), ("a.json", b'{"captions": ["x"], "score": 2}'), ("b.jpg", b"")], "laion/00007.tar")
    (path.parent / "00007.quarantine.jsonl").write_text("")
    found, refused = read_source(path.parent, Columns())
    assert [record.reason for record in refused] == ["missing_caption"]
    encoded = check_pair(found[0], "k", 10**6, None)
    assert (encoded.image, encoded.metadata["score"], encoded.metadata["source_key"]) == (jpeg(), 2, "a")


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        ({}, "absent", "does not exist; name a folder"),
        ({}, "", r"holds no pictures .*no captions file"),
        ({"a.csv": "x", "b.jsonl": "{}"}, "", r"several captions files \(a.csv, b.jsonl\)"),
        ({"a.parquet": ""}, "a.parquet", r"does not end in .csv, .tsv, .jsonl"),
        (
            {"a.csv": "photo,caption\n1,2\n"},
            "a.csv",
            r"none of the columns image, .*set image_column to one of its own: photo, caption",
        ),
        ({"a.jsonl": ""}, "a.jsonl", "holds no rows"),
    ],
)
def test_mistakes_are_told_in_a_sentence(tmp_path, files, name, message):
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message):
        read_source(tmp_path / name, Columns())
    if name == "a.jsonl":
        return
    (tmp_path / "good.csv").write_text("image,caption\n1,2\n")
    with pytest.raises(UserError, match=r"caption_column 'words' is not a column of .*; its columns are image, caption"):
        read_source(tmp_path / "good.csv", Columns(caption="words"))


def test_a_picture_is_kept_as_it_is_unless_it_is_too_large_or_of_an_unusual_format(tmp_path, jpeg):
    for name, kind in (("a.jpg", "PNG"), ("b.gif", "GIF"), ("c.jpg", "JPEG")):
        (tmp_path / name).write_bytes(jpeg(size=(100, 50), kind=kind))
        (tmp_path / name).with_suffix(".txt").write_text("x")
    a, b, c = read_source(tmp_path, Columns())[0]
    assert (check_pair(a, "a", 10**6, None).suffix, check_pair(b, "b", 10**6, None).suffix) == ("png", "png")
    kept = check_pair(c, "c", 10**6, 100)
    assert (kept.suffix, kept.image, kept.metadata) == ("jpg", (tmp_path / "c.jpg").read_bytes(), {})
    assert check_pair(a, "a", 10**6, 99).suffix == "jpg"
    with pytest.raises(SampleError, match="image_bomb"):
        check_pair(c, "c", 4999, None)


@pytest.mark.parametrize("name", ["absent.jpg", "folder.jpg", "nul\0.jpg"])
def test_a_picture_that_cannot_be_opened_is_a_refusal(tmp_path, name):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "c.jsonl").write_text(json.dumps({"image": name, "caption": "x"}))
    pairs, _ = read_source(tmp_path / "c.jsonl", Columns())
    assert isinstance(pairs[0].image, Path)
    with pytest.raises(SampleError, match=r"missing_image|unreadable_image"):
        check_pair(pairs[0], "k", 10**6, None)


def test_one_odd_file_or_row_does_not_stop_the_others(tmp_path, jpeg):
    for name in ("a", "folder", "loop"):
        (tmp_path / f"{name}.jpg").write_bytes(jpeg())
    (tmp_path / "a.txt").write_text("a picture")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "odd.tar").mkdir()
    pairs, refused = listed(tmp_path)
    assert pairs == {"a": ("a.jpg", ("a picture",))}
    assert refused == {("folder.jpg", "malformed_caption"), ("loop.jpg", "malformed_caption")}

    os.mkfifo(tmp_path / "pipe.jpg")
    rows = [json.dumps({"image": name, "caption": "a picture"}) for name in ("a.jpg", "pipe.jpg")]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, "[" * 200_000]) + "\n")
    found, bad = read_source(tmp_path / "rows.jsonl", Columns())
    assert [record.reason for record in bad] == ["malformed_row"]
    check_pair(found[0], "a", 10**6, None)
    with pytest.raises(SampleError, match="not a regular file"):
        check_pair(found[1], "pipe", 10**6, None)


def test_a_source_that_holds_nothing_says_so(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    for source, sentence in ((tmp_path / "empty.jsonl", "holds no rows"), (Path("/dev/null"), "neither a folder nor a file")):
        with pytest.raises(UserError, match=sentence):
            read_source(source, Columns())
