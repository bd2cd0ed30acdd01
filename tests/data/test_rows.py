"""The rows of a run: whole documents, once per epoch, in an order that no rank, batch size or restart can change."""

import dataclasses
import hashlib
import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.data.epoch_plan import EpochPlan, planned
from lavit_dist.data.global_batches import GlobalBatches
from lavit_dist.data.manifest import load_manifest
from lavit_dist.data.micro_batch import PADDING_DOCUMENT, MicroBatch
from lavit_dist.data.rows import RowDataset
from lavit_dist.errors import UserError
from lavit_dist.models.vocabulary import Vocabulary

VOCABULARY = Vocabulary(50, 70)
EOS = 0
SEQ_LEN = 48
RANDOM = np.random.default_rng(1)
SHARDS = [[(int(RANDOM.integers(4, 12)), int(RANDOM.integers(2, 9))) for _ in range(size)] for size in (13, 0, 21, 9, 17)]
LENGTHS = st.tuples(st.integers(0, 20), st.integers(0, 20))


def rows_of(folder, *, seq_len=SEQ_LEN, seed=0, caption_dropout=0.3, min_block_documents=16, **settings):
    return RowDataset(
        load_manifest(folder), VOCABULARY, EOS, seq_len, seed, caption_dropout, min_block_documents=min_block_documents, **settings
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_id_set):
    folder = tmp_path_factory.mktemp("ids")
    write_id_set(folder, SHARDS)
    return folder


@pytest.fixture
def rows(folder):
    return rows_of(folder)


def joined(batches: list[MicroBatch]) -> MicroBatch:
    fields = [field.name for field in dataclasses.fields(MicroBatch)]
    return MicroBatch(*(torch.cat([getattr(batch, name) for batch in batches]) for name in fields))


def same(left: MicroBatch, right: MicroBatch) -> bool:
    return all(torch.equal(getattr(left, field.name), getattr(right, field.name)) for field in dataclasses.fields(MicroBatch))


def documents_of(tokens: torch.Tensor, document_ids: torch.Tensor) -> list[list[int]]:
    return [tokens[document_ids == number].tolist() for number in range(int(document_ids.max()) + 1)]


@given(st.lists(st.lists(LENGTHS, max_size=20), min_size=1, max_size=4).filter(any), st.integers(0, 99), st.integers(1, 12))
def test_every_epoch_holds_every_document_once(tmp_path_factory, write_id_set, shards, seed, least):
    folder = tmp_path_factory.mktemp("ids")
    write_id_set(folder, shards)
    rows = rows_of(folder, seed=seed, min_block_documents=least)
    for epoch in range(3):
        seen = []
        for row in range(rows.rows_before_epoch(epoch), rows.rows_before_epoch(epoch + 1)):
            row_epoch, documents = rows.row_documents(row)
            lengths = list(map(len, rows.row_tokens(row)))
            assert row_epoch == epoch
            assert sum(lengths) <= SEQ_LEN
            assert sum(rows.labels(row)) == sum(lengths) - len(lengths)
            seen += documents.tolist()
        assert sorted(seen) == list(range(sum(map(len, shards))))


def test_epochs_differ_in_order_orientation_and_dropped_captions(rows):
    def epoch(number):
        return [rows.row_tokens(row) for row in range(rows.rows_before_epoch(number), rows.rows_before_epoch(number + 1))]

    first, second = epoch(0), epoch(1)
    assert [list(map(len, row)) for row in first] != [list(map(len, row)) for row in second]
    leads = [document[0] != VOCABULARY.image_start for row in first for document in row]
    dropped = [
        len(document) > 1 and document[-2] == VOCABULARY.image_end and document[0] == VOCABULARY.image_start
        for row in first
        for document in row
    ]
    assert 0.15 < np.mean(leads) < 0.6  # half of the 70 % that keep their caption
    assert 0.15 < np.mean(dropped) < 0.45


@pytest.mark.parametrize("data_size", [1, 2, 3, 4, 8])
def test_the_union_over_ranks_is_the_global_batch_in_order(rows, data_size):
    batches = GlobalBatches(rows, 24)
    for step in range(4):
        whole = batches.micro_batches(step, 0, 1, 24)[0]
        for rank in range(data_size):
            part = joined(batches.micro_batches(step, rank, data_size, 24 // data_size // 3 or 1))
            assert same(part, MicroBatch(*(tensor[rank::data_size] for tensor in dataclasses.astuple(whole))))


def test_weights_sum_to_one_over_the_global_batch(rows):
    batches = GlobalBatches(rows, 6)
    for step in range(12):  # more than two epochs
        parts = [part for rank in range(3) for part in batches.micro_batches(step, rank, 3, 1)]
        weights = torch.cat([part.loss_weight for part in parts])
        assert weights.sum().item() == pytest.approx(1, abs=1e-5)
        assert weights.count_nonzero().item() == batches.total_weight(step)


def test_a_row_is_laid_out_as_documented(rows):
    batch = joined(GlobalBatches(rows, 8).micro_batches(3, 0, 1, 2))
    assert [tensor.dtype for tensor in dataclasses.astuple(batch)] == [torch.int64] * 3 + [torch.int32, torch.uint8, torch.float32]
    for row in range(8):
        tokens, labels, positions, ids = (tensor[row] for tensor in dataclasses.astuple(batch)[:4])
        weights, modality = batch.loss_weight[row], batch.modality[row]
        documents = documents_of(tokens, ids)
        assert [len(document) for document in documents] == [len(document) for document in rows.row_tokens(24 + row)]
        assert all(document[-1] == EOS for document in documents)
        starts = torch.cat([torch.tensor([True]), ids[1:] != ids[:-1]])
        assert torch.equal(positions == 0, starts)
        assert torch.equal(positions[1:][~starts[1:]], positions[:-1][~starts[1:]] + 1)
        inside = torch.cat([(ids[1:] == ids[:-1]) & (ids[:-1] != PADDING_DOCUMENT), torch.tensor([False])])
        assert torch.equal(weights > 0, inside)  # the last token of a document, and padding, have no label
        assert torch.equal(labels[:-1][inside[:-1]], tokens[1:][inside[:-1]])
        assert torch.equal(modality.bool() & inside, inside & (labels >= VOCABULARY.image_end))
        assert int(labels.max()) < VOCABULARY.size


@pytest.mark.parametrize(("global_batch_size", "data_sizes"), [(1, [1]), (4, [1, 2, 4]), (7, [1, 7]), (24, [3, 8])])
def test_a_run_resumed_at_any_step_on_any_ranks_equals_the_straight_one(folder, global_batch_size, data_sizes):
    straight = GlobalBatches(rows_of(folder), global_batch_size)
    steps = 2 * straight.rows.sources["ids"].rows_before_epoch(1) // global_batch_size + 2
    expected = [joined(straight.micro_batches(step, 0, 1, global_batch_size)) for step in range(steps)]
    for step in range(steps):
        resumed = GlobalBatches(rows_of(folder, verify=False), global_batch_size)
        resumed.load_state(straight.state(step))
        for data_size in data_sizes:
            for rank in range(data_size):
                part = joined(resumed.micro_batches(step, rank, data_size, 1))
                assert same(part, MicroBatch(*(tensor[rank::data_size] for tensor in dataclasses.astuple(expected[step]))))


def test_the_state_knows_the_epoch_and_nothing_of_ranks(rows):
    batches = GlobalBatches(rows, 5)
    border = rows.rows_before_epoch(1)
    assert batches.state(0)["sources"]["ids"]["epoch"] == 0
    consumed = -(-border // 5) * 5
    assert batches.state(consumed // 5) == {
        "sources": {
            "ids": {
                "fingerprint": rows.manifest.fingerprint,
                "plan_digest": rows.plan_digest,
                "seed": 0,
                "epoch": 1,
                "rows_consumed": consumed,
            }
        },
        "phases": [{"first_row": 0, "rows_per_million": {"ids": 1_000_000}}],
        "rows_consumed": consumed,
        "batches_skipped": 0,
    }


def test_rows_are_what_they_were(tmp_path, write_id_set):
    """Pinned: a change would silently reorder the data of every run that is resumed; raise PACKER_VERSION with it."""
    write_id_set(tmp_path, [[(4 + 7 * index % 9, 2 + 5 * index % 7) for index in range(size)] for size in (15, 20, 11)])
    rows = rows_of(tmp_path)
    plan = hashlib.sha256()
    for row in range(rows.rows_before_epoch(2)):
        documents = [(len(document), bool(document[0] == VOCABULARY.image_start)) for document in rows.row_tokens(row)]
        plan.update(f"{rows.row_documents(row)[1].tolist()} {documents}\n".encode())
    assert plan.hexdigest() == "20a37442e4603f7b10b6f5bc38e1ececc76c92da4e4147c4ad1211e4b57b51c9"


@pytest.mark.parametrize("changed", [{"seed": 1}, {"seq_len": 47}, {"caption_dropout": 0.2}, {"min_block_documents": 17}])
def test_the_plan_digest_changes_with_every_setting(folder, rows, changed):
    other = rows_of(folder, **changed)
    assert other.plan_digest != rows.plan_digest
    with pytest.raises(UserError, match="with another seed, seq_len, caption_dropout"):
        GlobalBatches(other, 4).load_state(GlobalBatches(rows, 4).state(3))


def test_another_data_set_is_refused_on_resume(rows, tmp_path, write_id_set):
    write_id_set(tmp_path, SHARDS[::-1])
    state = GlobalBatches(rows, 4).state(3)
    with pytest.raises(UserError, match=f"trained on the id set {rows.manifest.fingerprint[:16]}"):
        GlobalBatches(rows_of(tmp_path), 4).load_state(state)


def test_documents_longer_than_a_row_are_left_out_with_a_warning(tmp_path, write_id_set, caplog):
    write_id_set(tmp_path, [[(5, 5), (40, 10), (6, 3)]])
    with caplog.at_level(logging.WARNING):
        rows = rows_of(tmp_path)
    assert "1 of 3 documents" in caplog.text
    assert "the longest has 53 tokens" in caplog.text
    assert (rows.num_documents, rows.total_tokens) == (2, 13 + 12)
    for row in range(rows.rows_before_epoch(5)):
        assert 1 not in rows.row_documents(row)[1]


def test_what_can_not_work_is_refused(folder, rows):
    with pytest.raises(UserError, match="seq_len 4 is too short for every document"):
        rows_of(folder, seq_len=4)
    with pytest.raises(UserError, match="50 text ids and 70 codes, but this run has 51 and 70"):
        RowDataset(load_manifest(folder), Vocabulary(51, 70), EOS, SEQ_LEN, 0, 0.1)
    with pytest.raises(UserError, match="choose a multiple of 12"):
        GlobalBatches(rows, 16).micro_batches(0, 0, 3, 4)


def test_a_damaged_shard_is_refused_before_training(tmp_path, write_id_set):
    write_id_set(tmp_path, SHARDS)
    path = tmp_path / "shard-00003.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00003\.arrow is damaged"):
        rows_of(tmp_path)


def test_a_kept_plan_is_read_in_place_of_packing(folder, tmp_path, monkeypatch):
    expected = rows_of(folder, plans=tmp_path)
    before = [expected.rows_before_epoch(epoch) for epoch in range(3)]
    monkeypatch.setattr(RowDataset, "_plan_block", lambda *_: pytest.fail("packed again"))
    again = rows_of(folder, plans=tmp_path)
    assert [again.rows_before_epoch(epoch) for epoch in range(3)] == before
    assert [again.row_documents(row)[1].tolist() for row in range(9)] == [
        expected.row_documents(row)[1].tolist() for row in range(9)
    ]
    assert (again.num_documents, again.total_tokens) == (expected.num_documents, expected.total_tokens)


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: content.replace(b"1", b"2", 1), lambda _: b""])
def test_a_damaged_plan_is_made_again(folder, tmp_path, caplog, damage):
    expected = rows_of(folder, plans=tmp_path).rows_before_epoch(1)
    (path,) = tmp_path.glob("*.json")
    path.write_bytes(damage(path.read_bytes()))
    assert rows_of(folder, plans=tmp_path).rows_before_epoch(1) == expected
    assert "is damaged" in caplog.text
    assert EpochPlan.read(path) is not None


def test_a_plan_of_other_shards_is_refused(folder, tmp_path):
    rows = rows_of(folder, plans=tmp_path)
    (path,) = tmp_path.glob("*.json")
    plan = EpochPlan.read(path)
    EpochPlan(plan.rows + 1, plan.lengths, plan.usable).write(path)
    with pytest.raises(UserError, match="the shards or the plan in"):
        rows_of(folder, plans=tmp_path).row_tokens(0)
    assert rows.row_tokens(0)


def test_a_plan_that_can_not_be_kept_is_made_all_the_same(folder, rows, tmp_path, caplog):
    (tmp_path / "plans").write_text("a file")
    assert rows_of(folder, plans=tmp_path / "plans").rows_before_epoch(1) == rows.rows_before_epoch(1)
    assert "set plan_cache to a folder that can be written" in caplog.text


def test_a_plan_does_not_depend_on_how_many_threads_make_it(folder, rows):
    blocks = len(rows._blocks_of_epoch(1))
    plans = [planned(None, blocks, lambda block: rows._plan_block(1, block), threads) for threads in (1, 3, 16)]
    for plan in plans:
        assert blocks > 1
        assert plan.rows.tolist() == plans[0].rows.tolist()
        assert plan.num_rows == rows.rows_before_epoch(2) - rows.rows_before_epoch(1)
