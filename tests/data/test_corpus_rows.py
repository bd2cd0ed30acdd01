"""Rows of text corpora: every one is found once, whatever the file's form, and what is wrong with it is said."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.data import corpus_rows
from lavit_dist.data.corpus_files import ROW_BYTES, list_corpus, read_pieces
from lavit_dist.data.corpus_rows import Columns, read_rows
from lavit_dist.data.quarantine import SampleError
from lavit_dist.data.text_encoder import TextEncoder
from lavit_dist.data.text_tokenizer import TextTokenizer
from lavit_dist.errors import UserError

TEXT = Columns("text")
DEFECTS = {
    b'{"text": "good"}': "good",
    b'{"text": "cut off': "malformed_row",
    b"[1, 2]": "malformed_row",
    b'"text"': "malformed_row",
    b"[" * 100_000: "malformed_row",
    b'{"text": ' + b"9" * 5000 + b"}": "malformed_row",
    b'{"text": "\xff\xfe"}': "not_utf8",
    '{"text": "utf-16"}'.encode("utf-16"): "not_utf8",
    b'{"content": "elsewhere"}': "missing_text",
    b'{"text": null}': "missing_text",
    b'{"text": 7}': "wrong_type",
    b'{"text": ["a"]}': "wrong_type",
    b'{"text": ""}': "empty_text",
    b'{"text": " \\n\\u2003"}': "empty_text",
    b'{"text": "half \\ud83d"}': "lone_surrogate",
    b'{"text": "whole \\ud83d\\ude00, NUL \\u0000"}': "whole \U0001f600, NUL \x00",
    b'{"text": "  kept as it is\\n", "text2": NaN}': "  kept as it is\n",
}


@pytest.fixture(scope="module")
def tokenizer(pretrain_settings):
    return TextTokenizer.load(pretrain_settings["text_tokenizer"])


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACKED = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstd}


def found(row):
    """The text, or the reason why there is none."""
    return row.text.reason if isinstance(row.text, SampleError) else row.text


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_each_defect_has_its_reason_in_every_form(tmp_path, suffix, end):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(PACKED[suffix](b"\xef\xbb\xbf" + (end + end).join(DEFECTS)))  # the last line has no end
    rows = list(read_rows(path, path.name, TEXT))
    assert [found(row) for row in rows] == list(DEFECTS.values())
    assert [row.key for row in rows] == [
        f"a{suffix}:{2 * index + 1}" for index in range(len(DEFECTS))
    ]  # blank lines count as lines
    assert [row.size for row in rows[1:-1]] == [len(line) + len(end) - 1 for line in list(DEFECTS)[1:-1]]


def test_a_line_without_end_is_refused_without_being_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_rows, "LONGEST_LINE", 1000)
    lines = [json.dumps({"text": "a" * length}).encode() for length in (988, 989, 300_000, 5)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    rows = list(read_rows(tmp_path / "a.jsonl", "a.jsonl", TEXT))
    assert [found(row) for row in rows] == ["a" * 988, "line_too_long", "line_too_long", "a" * 5]
    assert [row.size for row in rows] == [len(line) for line in lines]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_stream_that_is_cut_is_told_apart_from_one_that_is_no_stream(tmp_path, suffix):
    lines = [json.dumps({"text": f"text {index * 7919 % 10_007}"}).encode() for index in range(30_000)]
    whole = PACKED[suffix](b"\n".join(lines))
    path = tmp_path / f"a{suffix}"
    for content, reason in (
        (whole[: len(whole) // 2], "truncated_file"),
        (whole + b"what is this?", "unreadable_file"),
        (b"<html>no such file</html>", "unreadable_file"),
    ):
        path.write_bytes(content)
        with pytest.raises(SampleError, match=reason):
            list(read_rows(path, path.name, TEXT))
    path.write_bytes(whole + whole)  # members may follow one another
    assert sum(1 for _ in read_rows(path, path.name, TEXT)) == 59_999


def test_rows_before_the_damage_are_kept_and_the_file_is_named(tmp_path):
    lines = b"".join(json.dumps({"text": f"text {index * 7919 % 10_007}"}).encode() + b"\n" for index in range(60_000))
    whole = gzip.compress(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.jsonl").write_text('{"text": "after"}')
    files = [(name, tmp_path / name) for name in ("a.jsonl.gz", "b.jsonl")]
    (piece,) = read_pieces(files, TEXT, 1 << 40)
    assert len(piece.rows) > 15_000
    assert found(piece.rows[-1]) == "after"
    assert [(record.key, record.reason) for record in piece.damaged] == [("a.jsonl.gz", "truncated_file")]


def write_parquet(path, columns, **settings):
    pq.write_table(pa.table(columns), path, **settings)


def test_parquet_strings_of_any_type_and_what_is_no_string(tmp_path):
    texts = ["good", "", None, "again"]
    expected = ["good", "empty_text", "missing_text", "again"]
    for number, kind in enumerate((pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string()))):
        path = tmp_path / f"{number}.parquet"
        write_parquet(path, {"text": pa.array(texts, kind), "id": [1, 2, 3, None]}, row_group_size=3)
        rows = list(read_rows(path, path.name, TEXT))
        assert [found(row) for row in rows] == expected
        assert [row.key for row in rows] == [f"{number}.parquet:{row}" for row in range(1, 5)]
        assert [row.size for row in rows] == [4, 0, 0, 5]
        keyed = list(read_rows(path, path.name, Columns("text", "id")))
        assert [(row.key, found(row)) for row in keyed[:2]] == [("1", "good"), ("2", "empty_text")]
        assert (keyed[3].key, found(keyed[3])) == (f"{number}.parquet:4", "malformed_key")
    bad = pa.array([b"\xff", b"fine"]).cast(pa.binary())
    foreign = pa.StringArray.from_buffers(2, bad.buffers()[1], bad.buffers()[2])
    for name, column, reasons in (
        ("binary", bad, ["wrong_type"] * 2),
        ("list", [["a"], None], ["wrong_type", "missing_text"]),
        ("integer", [1, 2], ["wrong_type"] * 2),
        ("latin", foreign, ["not_utf8", "fine"]),
    ):
        write_parquet(tmp_path / f"{name}.parquet", {"text": column})
        assert [found(row) for row in read_rows(tmp_path / f"{name}.parquet", f"{name}.parquet", TEXT)] == reasons


def test_damaged_parquet_files_and_absent_columns(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, {"text": [f"text {index}" for index in range(2000)]}, row_group_size=500, compression="zstd")
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"PAR1", content[:300] + b"\xff" * 400 + content[700:]):
        path.write_bytes(damaged)
        with pytest.raises(SampleError, match=r"unreadable_file|truncated_file"):
            list(read_rows(path, path.name, TEXT))
    path.write_bytes(content)
    with pytest.raises(SampleError, match="missing_column: body is not among its columns text"):
        list(read_rows(path, path.name, Columns("body")))


def test_a_file_that_is_gone_is_no_damage(tmp_path):
    for name in ("a.jsonl", "a.jsonl.zst", "a.parquet"):
        with pytest.raises(FileNotFoundError):
            list(read_rows(tmp_path / name, name, TEXT))


def test_keys_are_names_of_rows_where_there_are_any(tmp_path):
    values = [{"text": "a", "id": key} for key in ("name", 12, "", None, True, "\ud800", [1])]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, values)))
    rows = list(read_rows(tmp_path / "a.jsonl", "a.jsonl", Columns("text", "id")))
    assert [(row.key, found(row)) for row in rows[:2]] == [("name", "a"), ("12", "a")]
    assert [(row.key, found(row)) for row in rows[2:]] == [(f"a.jsonl:{line}", "malformed_key") for line in range(3, 8)]


LINES = st.lists(
    st.builds(lambda text: json.dumps({"text": text}).encode(), st.text(max_size=30))
    | st.sampled_from([*DEFECTS, b"", b"   "])
    | st.binary(max_size=20).map(lambda data: data.replace(b"\n", b"")),
    max_size=25,
)


@given(LINES, st.sampled_from(sorted(PACKED)), st.integers(1, 3000), st.integers(0, 5), st.integers(5, 20))
def test_each_line_is_used_quarantined_or_filtered_once(tmp_path_factory, tokenizer, lines, suffix, bytes_per_piece, least, most):
    folder = tmp_path_factory.mktemp("corpus")
    names = [f"{name}{suffix}" for name in "ab"]
    for name, part in zip(names, (lines[::2], lines[1::2]), strict=True):
        (folder / name).write_bytes(PACKED[suffix](b"\n".join(part)))
    files = [(name, folder / name) for name in names]
    pieces = list(read_pieces(files, TEXT, bytes_per_piece))
    rows = [row for piece in pieces for row in piece.rows]
    (whole,) = read_pieces(files, TEXT, 1 << 40)
    assert [(row.key, found(row)) for row in rows] == [(row.key, found(row)) for row in whole.rows]
    for piece in pieces[:-1]:
        sizes = [row.size + ROW_BYTES for row in piece.rows]
        assert sum(sizes[:-1]) < bytes_per_piece <= sum(sizes)
    filled = {
        f"{name}:{line}"
        for name, part in zip(names, (lines[::2], lines[1::2]), strict=True)
        for line, text in enumerate(part, 1)
        if text.strip()
    }
    encoder = TextEncoder(tokenizer, min_characters=least, max_characters=most)
    encoded = [encoder.encode(piece.rows) for piece in pieces]
    used = [document.key for part in encoded for document in part.documents]
    refused = [record.key for part in encoded for record in part.quarantined]
    filtered = filled - set(used) - set(refused)
    texts = {row.key: row.text for row in rows}
    assert len(used) + len(refused) == len({*used, *refused})
    assert {row.key for row in rows} == filled and len(rows) == len(filled)
    assert all(least <= len(texts[key]) <= most for key in used)
    assert all(not least <= len(texts[key]) <= most for key in filtered)
    assert all(isinstance(texts[key], SampleError) for key in refused)
    for part in encoded:
        assert part.outcomes.used == len(part.documents)
        assert part.outcomes.samples == part.rows
        assert sum(part.outcomes.quarantined.values()) == len(part.quarantined)
    assert sum(sum(part.outcomes.filtered.values()) for part in encoded) == len(filtered)
    for document in (document for part in encoded for document in part.documents):
        assert [ids.tolist() for _, ids in document.segments] == [tokenizer.encode(texts[document.key])]


class Picky(TextTokenizer):
    """Raises as the library does for some tokenizers without a token for what is unknown, and has no ids for blanks."""

    def encode_batch(self, texts):
        if any("?" in text for text in texts):
            raise Exception("WordPiece error: Missing [UNK] token from the vocabulary")
        return [[] if text == "none" else [1] for text in texts]


def test_what_the_tokenizer_can_not_take_is_quarantined_alone(tmp_path, tokenizer):
    picky = Picky.load(tokenizer.folder)
    picky.__class__ = Picky
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ("a", "why?", "none", "b")))
    (piece,) = read_pieces([("a.jsonl", tmp_path / "a.jsonl")], TEXT, 1 << 40)
    encoded = TextEncoder(picky).encode(piece.rows)
    assert [document.key for document in encoded.documents] == ["a.jsonl:1", "a.jsonl:4"]
    assert [(record.key, record.reason) for record in encoded.quarantined] == [
        ("a.jsonl:2", "not_tokenizable"),
        ("a.jsonl:3", "not_tokenizable"),
    ]


def test_a_corpus_is_its_files_by_name_from_anywhere(tmp_path):
    for name in ("b.jsonl", "a.parquet", "c.json.gz", "readme.md", "d/e.jsonl.zst", "facts.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1234")
    assert [file.name for file in list_corpus(str(tmp_path), {})] == ["a.parquet", "b.jsonl", "c.json.gz"]
    assert [file.name for file in list_corpus([f"{tmp_path}/b.jsonl", f"{tmp_path}/**/*.zst"], {})] == ["b.jsonl", "d/e.jsonl.zst"]
    for source, sentence in {
        "nowhere.jsonl": "None of the 1 files that corpus names exists",
        str(tmp_path / "d" / "*.parquet"): r"matches no file; name a folder of files, a pattern such as DIR/\*.jsonl, or a URL",
        str(tmp_path / "readme.md"): "is none of .jsonl",
        f"{tmp_path}/{{b,c}}.jsonl": r"c\.jsonl, which does not exist",
    }.items():
        with pytest.raises(UserError, match=sentence):
            list_corpus(source, {})
