"""The audit of an epoch: it holds for what the packer makes, and names what a broken plan does."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from lavit_dist.config.documents import DEFAULT_DOCUMENTS, DocumentsConfig
from lavit_dist.data.epoch_audit import NAMED, audit_epoch
from lavit_dist.data.id_shard import IMAGE, TEXT, Encoding, IdDocument
from lavit_dist.data.id_shard_writer import write_id_shard
from lavit_dist.data.manifest import load_manifest, write_manifest
from lavit_dist.data.rows import RowDataset
from lavit_dist.data.spans import Spans
from lavit_dist.models.vocabulary import Vocabulary

VOCABULARY = Vocabulary(50, 70)
EOS = 0
SEQ_LEN = 48
SHARDS = [[(4 + 7 * index % 9, 2 + 5 * index % 7) for index in range(size)] for size in (15, 20, 0, 11)]
LONG = [[(10, 200), (60, 3), (9, 4), (20, 30)], [(5, 60), (46, 0), (45, 3), (8, 8)]]


def open_rows(folder: Path, cls: type[RowDataset] = RowDataset, policy: DocumentsConfig = DEFAULT_DOCUMENTS) -> RowDataset:
    return cls(load_manifest(folder), VOCABULARY, EOS, SEQ_LEN, 3, 0.3, policy, min_block_documents=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_id_set):
    folder = tmp_path_factory.mktemp("ids")
    write_id_set(folder, SHARDS)
    return folder


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory, write_id_set):
    folder = tmp_path_factory.mktemp("long")
    write_id_set(folder, LONG)
    return folder


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_every_epoch_holds_and_is_counted(folder, epoch):
    rows = open_rows(folder)
    found = audit_epoch(rows, epoch)
    numbers = range(rows.rows_before_epoch(epoch), rows.rows_before_epoch(epoch + 1))
    assert found.ok and not found.offences
    assert (found.rows, found.documents, found.cut, found.left_out) == (len(numbers), 46, 0, {})
    tokens = [[len(document) for document in rows.row_tokens(row)] for row in numbers]
    assert found.slots - found.padding == sum(map(sum, tokens))
    assert found.text_labels + found.image_labels == sum(sum(row) - len(row) for row in tokens)
    assert found.image_labels == sum(rows.labels(row)[1] for row in numbers) > 0


def test_what_is_left_out_is_counted_by_reason(long_folder):
    dropped = audit_epoch(open_rows(long_folder), 0)
    assert dropped.ok and dropped.documents == 2
    assert dropped.left_out == {"longer than seq_len 48": 6}
    split = audit_epoch(open_rows(long_folder, policy=DocumentsConfig(too_long="split")), 0)
    assert split.ok and split.documents == 6 and split.cut >= 2
    assert split.left_out == {"image does not fit a row": 2}


@pytest.mark.parametrize("weights", [{"text_loss_weight": 0.0}, {"image_loss_weight": 0.0}, {"supervise": "second"}])
def test_it_counts_the_loss_that_the_policy_leaves(folder, weights):
    everything, found = audit_epoch(open_rows(folder), 0), audit_epoch(open_rows(folder, policy=DocumentsConfig(**weights)), 0)
    assert found.ok
    assert found.text_labels <= everything.text_labels and found.image_labels <= everything.image_labels
    assert (found.text_labels == 0, found.image_labels == 0) == ("text_loss_weight" in weights, "image_loss_weight" in weights)
    assert found.text_labels + found.image_labels < everything.text_labels + everything.image_labels


def test_one_caption_of_each_image(tmp_path):
    documents = [
        IdDocument(str(image), caption, ((IMAGE, [1] * 5), (TEXT, [2] * 3)), b"\xf0", "a cat", ("00000.tar", 512 * image, 100))
        for image in range(9)
        for caption in range(1 + image % 3)
    ]
    encoding = Encoding("visual", "text", "preprocessing", "settings", 50, 70)
    record = write_id_shard(tmp_path / "shard-00000.arrow", documents, encoding=encoding, inputs=())
    write_manifest(tmp_path, [record])
    for epoch in range(3):
        found = audit_epoch(open_rows(tmp_path, policy=DocumentsConfig(captions="one")), epoch)
        assert found.ok and found.documents == 9
        assert found.left_out == {"another caption of its image has its turn": 9}


class Repeating(RowDataset):
    """Row 1 comes again in place of row 2."""

    def row_spans(self, row: int) -> Spans:
        return super().row_spans(1 if row == 2 else row)


class Overfull(RowDataset):
    """Row 2 is in row 1 as well."""

    def row_spans(self, row: int) -> Spans:
        spans = super().row_spans(row)
        return Spans.joined([spans, super().row_spans(2)], [0, 0]) if row == 1 else spans


class Forgetful(RowDataset):
    """Every row lacks its last document."""

    def row_spans(self, row: int) -> Spans:
        return super().row_spans(row)[:-1]


class Cutting(RowDataset):
    """The first document of row 0 lacks its last token."""

    def row_spans(self, row: int) -> Spans:
        spans = super().row_spans(row)
        shorter = spans.lengths - (np.arange(len(spans)) == 0)
        return dataclasses.replace(spans, lengths=shorter) if row == 0 else spans


class Mistaken(RowDataset):
    """One label too few counts for row 0."""

    def labels(self, row: int) -> tuple[int, int]:
        text, image = super().labels(row)
        return text - (row == 0), image


def name(rows: RowDataset, document: int) -> str:
    shard = int((rows.shard_starts <= document).nonzero()[0][-1])
    index = document - int(rows.shard_starts[shard])
    return f"{shard}-{index} (document {index} of shard-{shard:05d}.arrow)"


def test_a_document_that_comes_twice_and_one_that_is_missing_are_named(folder):
    right, found = open_rows(folder), audit_epoch(open_rows(folder, Repeating), 0)
    twice, missing = (right.row_documents(row)[1].tolist() for row in (1, 2))
    assert not found.ok
    expected = {f"{name(right, document)} comes 2 times." for document in twice}
    expected |= {f"{name(right, document)} is missing." for document in missing}
    assert expected <= set(found.offences)
    assert found.documents == 46 - len(missing)


def test_a_row_over_length_is_named(folder):
    right, found = open_rows(folder), audit_epoch(open_rows(folder, Overfull), 0)
    tokens = sum(len(document) for row in (1, 2) for document in right.row_tokens(row))
    assert found.offences[0] == f"Row 1 holds {tokens} tokens, over seq_len {SEQ_LEN}."
    assert f"{name(right, right.row_documents(2)[1][0])} comes 2 times." in found.offences


def test_offenders_are_counted_beyond_those_that_are_named(folder):
    found = audit_epoch(open_rows(folder, Forgetful), 0)
    assert len(found.offences) == NAMED < found.num_offences
    assert found.documents == 46 - found.rows


def test_a_document_that_is_cut_is_named(folder):
    right = open_rows(folder)
    document, length = right.row_documents(0)[1][0], len(right.row_tokens(0)[0])
    found = audit_epoch(open_rows(folder, Cutting), 0)
    assert found.offences[0] == f"Row 0 has tokens 0 to {length - 1} of {name(right, document)}, which has {length}."


def test_pieces_that_leave_a_gap_are_named(long_folder):
    policy = DocumentsConfig(too_long="split")

    class Gap(RowDataset):
        """Without the first piece of what is cut."""

        def row_spans(self, row: int) -> Spans:
            spans = super().row_spans(row)
            return spans[np.flatnonzero((spans.starts > 0) | (spans.lengths < SEQ_LEN))]

    found = audit_epoch(open_rows(long_folder, Gap, policy), 0)
    assert any(sentence.startswith("The pieces of 0-0 (document 0 of shard-00000.arrow)") for sentence in found.offences)


def test_labels_that_are_miscounted_are_named(folder):
    found = audit_epoch(open_rows(folder, Mistaken), 0)
    assert found.num_offences == 1
    assert found.offences[0].startswith("Row 0 has a loss on ")


def test_a_row_of_another_epoch_is_named(folder):
    class Late(RowDataset):
        """Epoch 0 is said to end a row later than it does."""

        def rows_before_epoch(self, epoch: int) -> int:
            return super().rows_before_epoch(epoch) + (epoch == 1)

    border = open_rows(folder).rows_before_epoch(1)
    assert f"Row {border} is of epoch 1." in audit_epoch(open_rows(folder, Late), 0).offences


def test_a_row_that_asks_for_more_than_its_document_has_is_named(folder):
    class Greedy(RowDataset):
        """The last document of one row is said to be longer than it is, within the row's padding."""

        def row_spans(self, row: int) -> Spans:
            spans = super().row_spans(row)
            longer = spans.lengths + (np.arange(len(spans)) == len(spans) - 1)
            return dataclasses.replace(spans, lengths=longer) if row == roomy else spans

    right = open_rows(folder)
    roomy = next(row for row in range(right.rows_before_epoch(1)) if sum(map(len, right.row_tokens(row))) < SEQ_LEN)
    found = audit_epoch(open_rows(folder, Greedy), 0)
    assert any(sentence.startswith(f"Row {roomy} can't be read: ") for sentence in found.offences)
