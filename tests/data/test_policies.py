"""Policies of documents and supervision through to micro-batches: rows that know their labels, and weights that no layout changes."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch

from lavit_dist.config.documents import DocumentsConfig
from lavit_dist.data.global_batches import GlobalBatches
from lavit_dist.data.id_shard import IMAGE, TEXT, IdDocument
from lavit_dist.data.manifest import load_manifest
from lavit_dist.data.micro_batch import MicroBatch
from lavit_dist.data.rows import RowDataset
from lavit_dist.errors import UserError
from lavit_dist.models.vocabulary import Vocabulary

VOCABULARY = Vocabulary(50, 70)
EOS = 0
SEQ_LEN = 48
CAPTIONS, IMAGES = 3, 12
SHARD_DOCUMENTS = CAPTIONS * IMAGES + 1
POLICIES = [
    {},
    {"captions": "one", "supervise": "second"},
    {"too_long": "split", "supervise": "generated", "image_loss_weight": 0.25},
    {"captions": "one", "too_long": "split", "supervise": "second", "text_loss_weight": 3.0, "image_loss_weight": 0.5},
    {"supervise": "generated", "image_loss_weight": 0.0},
    {"text_loss_weight": 0.0},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_documents):
    """Images with three captions each, of which some are too long for a row, and long texts."""
    random = np.random.default_rng(0)
    shards = []
    for number in range(4):
        documents = []
        for image in range(IMAGES):
            codes = random.integers(70, size=random.integers(3, 12))
            for caption in range(CAPTIONS):
                text = random.integers(1, 50, size=random.integers(2, 9) if random.random() < 0.9 else 120)
                segments = [(IMAGE, codes), (TEXT, text)]
                documents.append(IdDocument(f"{number}-{image}", caption, segments, b"", "", ("t.tar", 512 * image, 9)))
        text = random.integers(1, 50, size=random.integers(100, 300))
        shards.append([*documents, IdDocument(f"text {number}", 0, [(TEXT, text)], b"", "", ("", 0, 0))])
    folder = tmp_path_factory.mktemp("ids")
    write_documents(folder, shards)
    return folder


def rows_of(folder, **policy) -> RowDataset:
    return RowDataset(load_manifest(folder), VOCABULARY, EOS, SEQ_LEN, 0, 0.2, DocumentsConfig(**policy), min_block_documents=60)


def epoch_rows(rows: RowDataset, epoch: int) -> range:
    return range(rows.rows_before_epoch(epoch), rows.rows_before_epoch(epoch + 1))


def whole(batches: GlobalBatches, step: int, data_size: int, micro_batch_size: int) -> dict[str, torch.Tensor]:
    """The global batch in the order of its rows, as `data_size` ranks have it in parts."""
    fields = [field.name for field in dataclasses.fields(MicroBatch)]
    ranks = [batches.micro_batches(step, rank, data_size, micro_batch_size) for rank in range(data_size)]
    joined = [{name: torch.cat([getattr(part, name) for part in parts]) for name in fields} for parts in ranks]
    return {name: torch.stack([rank[name] for rank in joined], dim=1).flatten(0, 1) for name in fields}


@pytest.mark.parametrize("policy", POLICIES)
def test_weights_sum_to_one_and_stand_in_the_given_proportion(folder, policy):
    rows = rows_of(folder, **policy)
    batches = GlobalBatches(rows, 8)
    for step in range(len(epoch_rows(rows, 0)) // 4):  # two epochs
        batch = whole(batches, step, 1, 4)
        weight, modality = batch["loss_weight"], batch["modality"].bool()
        assert weight.sum().item() == pytest.approx(1, abs=1e-5)
        of_modality = [int((weight[which] > 0).sum()) for which in (~modality, modality)]
        assert tuple(of_modality) == batches.labels(step)
        image, text = weight[modality & (weight > 0)].unique(), weight[~modality & (weight > 0)].unique()
        assert len(image) <= 1 and len(text) <= 1  # one weight per modality
        if len(image) and len(text):
            ratio = policy.get("image_loss_weight", 1.0) / policy.get("text_loss_weight", 1.0)
            assert (image / text).item() == pytest.approx(ratio)
        assert not batch["labels"][weight == 0].any() and not modality[weight == 0].any()
        for parts in ((2, 2), (4, 1), (8, 1)):
            other = whole(batches, step, *parts)
            assert all(torch.equal(batch[name], other[name]) for name in batch)


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_know_their_labels_of_each_modality_from_lengths_alone(folder, policy):
    rows = rows_of(folder, **policy)
    batches = GlobalBatches(rows, 1)
    for row in epoch_rows(rows, 1):
        text, image = rows.labels(row)
        if not text + image:
            with pytest.raises(UserError, match=rf"No token of the global batch of step {row} has a loss; raise global_batch_size"):
                batches.micro_batches(row, 0, 1, 1)
            continue
        batch = whole(batches, row, 1, 1)
        supervised, of_image = batch["loss_weight"] > 0, batch["modality"].bool()
        assert (text, image) == (int((supervised & ~of_image).sum()), int(of_image.sum()))
        assert rows.row_spans(row).lengths.sum() <= SEQ_LEN
        assert list(map(len, rows.row_tokens(row))) == rows.row_spans(row).lengths.tolist()


def test_supervision_changes_no_row(folder):
    plain = rows_of(folder)
    for policy in ({"supervise": "second"}, {"supervise": "generated"}, {"image_loss_weight": 0.3}):
        rows = rows_of(folder, **policy)
        assert rows.plan_digest == plain.plan_digest
        for row in epoch_rows(plain, 0):
            assert all(map(np.array_equal, rows.row_tokens(row), plain.row_tokens(row)))
        kept = whole(GlobalBatches(rows, 8), 0, 1, 8)["loss_weight"] > 0
        every = whole(GlobalBatches(plain, 8), 0, 1, 8)["loss_weight"] > 0
        assert not (kept & ~every).any()


@pytest.mark.parametrize("too_long", ["drop", "split"])
def test_one_caption_of_each_image_is_in_an_epoch(folder, too_long):
    rows = rows_of(folder, captions="one", too_long=too_long)
    everything = rows_of(folder, too_long=too_long)
    in_all = {int(n) for row in epoch_rows(everything, 0) for n in everything.row_documents(row)[1]}
    seen: set[int] = set()
    for epoch in range(CAPTIONS):
        documents = {int(n) for row in epoch_rows(rows, epoch) for n in rows.row_documents(row)[1]}
        assert len(documents) == len(set(map(image_of, documents)))
        assert set(map(image_of, documents)) == set(map(image_of, in_all))
        seen |= documents
    assert seen == in_all


def image_of(document: int) -> tuple[int, int]:
    """The shard, and the image in it; the shard's text comes after them."""
    shard, within = divmod(document, SHARD_DOCUMENTS)
    return shard, within // CAPTIONS


def test_split_rows_hold_every_token_of_an_epoch(folder):
    rows = rows_of(folder, too_long="split")
    assert rows.num_documents == 4 * SHARD_DOCUMENTS
    spans = [rows.row_spans(row) for row in epoch_rows(rows, 0)]
    without_caption = {divmod(int(n), SHARD_DOCUMENTS) for of_row in spans for n in of_row.documents[of_row.drops_caption]}
    pairs = [(shard, within) for shard, within in without_caption if within < CAPTIONS * IMAGES]
    dropped = sum(len(rows.shards[shard].segments(within)[1][1]) for shard, within in pairs)
    assert sum(int(of_row.lengths.sum()) for of_row in spans) == rows.total_tokens - dropped


@pytest.mark.parametrize("changed", [{"captions": "one"}, {"too_long": "split"}])
def test_another_choice_of_documents_is_refused_on_resume(folder, changed):
    state = GlobalBatches(rows_of(folder), 4).state(3)
    with pytest.raises(UserError, match=r"documents\.captions, documents\.too_long"):
        GlobalBatches(rows_of(folder, **changed), 4).check_state(state)


def test_what_is_too_long_is_refused_or_told(folder, caplog):
    with pytest.raises(
        UserError, match=r"18 of 148 documents .* documents.too_long is error; raise seq_len, or set documents.too_long"
    ):
        rows_of(folder, too_long="error")
    with caplog.at_level(logging.INFO):
        rows_of(folder, too_long="split")
        assert "18 of 148 documents" in caplog.text and "the text of 18 is cut to fit rows" in caplog.text


def test_images_that_fit_no_row_are_left_out_with_a_warning(tmp_path, write_documents, caplog):
    pairs = [[(IMAGE, [1] * codes), (TEXT, [2] * 100)] for codes in (SEQ_LEN - 2, SEQ_LEN - 3, 5)]
    write_documents(tmp_path, [[IdDocument(str(n), 0, pair, b"", "", ("t", n, 0)) for n, pair in enumerate(pairs)]])
    with caplog.at_level(logging.WARNING):
        rows = rows_of(tmp_path, too_long="split")
    assert "3 of 3 documents" in caplog.text and "1 of them have an image that doesn't fit a row and are left out" in caplog.text
    assert {int(n) for row in epoch_rows(rows, 0) for n in rows.row_documents(row)[1]} == {1, 2}
