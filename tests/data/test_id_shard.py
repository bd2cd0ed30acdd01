"""What is written comes back; only a shard whose sidecar is there and true counts."""

import json

import numpy as np
import pyarrow as pa
import pytest

from lavit_dist.data.hashing import stable_hash
from lavit_dist.data.id_shard import (
    IMAGE,
    TEXT,
    Encoding,
    IdDocument,
    IdShard,
    InputFile,
    Lengths,
    Outcomes,
    is_intact,
    read_record,
    sidecar_path,
)
from lavit_dist.data.id_shard_writer import write_id_shard
from lavit_dist.errors import UserError

ENCODING = Encoding("v", "t", "p", "s", 50, 70)
DOCUMENTS = [
    IdDocument("a", 0, ((IMAGE, [3, 69]), (TEXT, [7, 8, 9])), b"\xa0", "a cat", ("0.tar", 512, 99), {"similarity": 0.31}),
    IdDocument("a", 1, ((IMAGE, [3, 69]), (TEXT, [7])), b"\xa0", "Eine Käfig", ("0.tar", 512, 99)),
    IdDocument("b", 0, ((TEXT, [1]), (IMAGE, [5]), (TEXT, [])), b"\x80", "", ("1.tar", 1024, 7)),
]
INPUTS = (InputFile("0.tar", 10240, "abc"),)

OUTCOMES = Outcomes(6, quarantined={"unreadable_image": 2, "image_bomb": 1}, filtered={"similarity": 1})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "shard-00000.arrow"


@pytest.fixture
def record(path):
    return write_id_shard(path, DOCUMENTS, encoding=ENCODING, inputs=INPUTS, outcomes=OUTCOMES)


def test_documents_come_back(path, record):
    shard = IdShard(path)
    assert len(shard) == 3
    for index, document in enumerate(DOCUMENTS):
        assert [(kind, ids.tolist()) for kind, ids in shard.segments(index)] == [tuple(segment) for segment in document.segments]
        assert shard.document_hash[index] == stable_hash(document.key, document.caption_index)
    assert shard.column("caption") == [document.caption for document in DOCUMENTS]
    assert shard.column("keep_mask") == [document.keep_mask for document in DOCUMENTS]
    assert shard.column("source_shard") == ["0.tar", "0.tar", "1.tar"]
    assert json.loads(shard.column("scores")[0]) == {"similarity": 0.31}


def test_the_record_counts_and_comes_back(path, record):
    assert read_record(path) == record
    assert (record.documents, record.images, record.outcomes, record.outcomes.used) == (3, 2, OUTCOMES, 2)
    assert record.code_lengths == Lengths(1, 5 / 3, 2)
    assert record.text_lengths == Lengths(0, 5 / 4, 3)
    assert record.inputs == INPUTS


def test_any_arrow_reader_reads_it(path, record):
    table = pa.ipc.open_file(str(path)).read_all()
    assert table["ids"].to_pylist()[0] == [3, 69, 7, 8, 9]
    assert table.schema.field("ids").type == pa.list_(pa.uint16())


def test_ids_beyond_16_bits_take_32(tmp_path):
    encoding = Encoding("v", "t", "p", "s", 128_256, 70)
    path = tmp_path / "large.arrow"
    document = IdDocument("a", 0, ((TEXT, [128_255]),), b"", "", ("0.tar", 0, 0))
    write_id_shard(path, [document], encoding=encoding, inputs=())
    assert IdShard(path).ids.tolist() == [128_255]


def test_the_same_documents_give_the_same_bytes(path, record, tmp_path):
    again = write_id_shard(tmp_path / "again" / path.name, DOCUMENTS, encoding=ENCODING, inputs=INPUTS, outcomes=OUTCOMES)
    assert again == record


def test_a_shard_without_documents_can_be_read(tmp_path):
    path = tmp_path / "empty.arrow"
    record = write_id_shard(path, [], encoding=ENCODING, inputs=INPUTS)
    assert (record.documents, len(IdShard(path)), record.code_lengths) == (0, 0, Lengths(0, 0.0, 0))


@pytest.mark.parametrize("content", [None, b"", b"{}", b"not json"])
def test_without_a_whole_sidecar_a_shard_is_not_committed(path, record, content):
    if content is None:
        sidecar_path(path).unlink()
    else:
        sidecar_path(path).write_bytes(content)
    assert read_record(path) is None


def test_a_changed_byte_is_noticed(path, record):
    assert is_intact(path, record)
    content = np.fromfile(path, np.uint8)
    content[len(content) // 2] ^= 1
    content.tofile(path)
    assert not is_intact(path, record)
    path.unlink()
    assert not is_intact(path, record)


def test_a_file_that_is_no_shard_is_refused(path):
    path.write_bytes(b"ARROW1 but not really")
    with pytest.raises(UserError, match=r"shard-00000\.arrow can't be read"):
        IdShard(path)
