"""A run over several id sets: which rows it trains on, how it goes on from a state with the same or other weights, and what it refuses."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch

from lavit_dist.data.global_batches import GlobalBatches
from lavit_dist.data.manifest import load_manifest
from lavit_dist.data.micro_batch import MicroBatch
from lavit_dist.data.mixed_rows import MixedRows
from lavit_dist.data.mixture import Asked
from lavit_dist.data.rows import RowDataset
from lavit_dist.errors import UserError
from lavit_dist.models.vocabulary import Vocabulary

VOCABULARY = Vocabulary(50, 70)
EOS = 0
SEQ_LEN = 48
BATCH = 12
RANDOM = np.random.default_rng(2)
SHARDS = {
    name: [[(int(RANDOM.integers(4, 12)), int(RANDOM.integers(2, 9))) for _ in range(size)] for size in sizes]
    for name, sizes in {"pairs": (13, 21, 9), "text": (30, 11), "fine": (8,)}.items()
}
WEIGHTS = {"pairs": 0.5, "text": 0.3, "fine": 0.2}
SEEDS = {"pairs": 3, "text": 4, "fine": 5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, write_id_set):
    root = tmp_path_factory.mktemp("sets")
    for name, shards in SHARDS.items():
        write_id_set(root / name, shards)
    return root


@pytest.fixture
def mix(folders):
    """`mix(weights, curriculum, max_epochs)`: the batches of a run; a curriculum is weights by first step."""

    def make(weights=WEIGHTS, curriculum=(), max_epochs=None, total_steps=None, seeds=SEEDS, names=None, batch=BATCH):
        sources = {
            name: RowDataset(
                load_manifest(folders / name), VOCABULARY, EOS, SEQ_LEN, seeds[name], 0.3, min_block_documents=16, verify=False
            )
            for name in names or weights
        }
        asked = [Asked(step * batch, weights) for step, weights in ((0, weights), *curriculum)]
        return GlobalBatches(MixedRows(sources, asked, max_epochs, total_steps and total_steps * batch), batch)

    return make


def joined(batches: list[MicroBatch]) -> MicroBatch:
    return MicroBatch(*(torch.cat(tensors) for tensors in zip(*map(dataclasses.astuple, batches), strict=True)))


def whole(batches: GlobalBatches, step: int) -> MicroBatch:
    return batches.micro_batches(step, 0, 1, batches.global_batch_size)[0]


def same(left: MicroBatch, right: MicroBatch) -> bool:
    return all(map(torch.equal, dataclasses.astuple(left), dataclasses.astuple(right)))


def stored(state):
    """A state as a checkpoint gives it back."""
    return json.loads(json.dumps(state))


def test_each_source_is_read_as_if_it_were_alone(mix):
    rows = mix().rows
    seen = dict.fromkeys(WEIGHTS, 0)
    for row in range(200):
        name, index = rows.mixture.locate(row)
        assert index == seen[name]
        seen[name] += 1
        assert all(map(np.array_equal, rows.row_tokens(row), rows.sources[name].row_tokens(index)))
        assert rows.labels(row) == rows.sources[name].labels(index)
    assert seen == {"pairs": 100, "text": 60, "fine": 40}


def test_one_set_alone_has_the_rows_it_has_without_a_mixture(mix):
    batches = mix({"pairs": 0.25})
    plain = GlobalBatches(batches.rows.sources["pairs"], BATCH)
    assert all(same(whole(batches, step), whole(plain, step)) for step in range(8))
    assert plain.shares_consumed(3) == {}


@pytest.mark.parametrize("data_size", [1, 2, 3, 4])
def test_the_union_over_ranks_is_the_global_batch_in_order(mix, data_size):
    batches = mix(curriculum=[(2, {"text": 1.0})])
    for step in range(4):
        expected = whole(batches, step)
        parts = [joined(batches.micro_batches(step, rank, data_size, 1)) for rank in range(data_size)]
        for rank, part in enumerate(parts):
            assert same(part, MicroBatch(*(tensor[rank::data_size] for tensor in dataclasses.astuple(expected))))
        assert sum(part.loss_weight.sum().item() for part in parts) == pytest.approx(1, abs=1e-5)
        assert sum(part.loss_weight.count_nonzero().item() for part in parts) == batches.total_weight(step)


def test_a_run_resumed_at_any_step_on_any_ranks_equals_the_straight_one(mix):
    settings = {"curriculum": [(4, {"pairs": 1.0, "text": 2.0, "fine": 0.5})], "max_epochs": {"fine": 4}}
    straight = mix(**settings)
    expected = [whole(straight, step) for step in range(14)]
    assert len(straight.rows.mixture.phases) == 3  # fine is used up on the way
    for step in range(14):
        resumed = mix(**settings)
        resumed.load_state(stored(straight.state(step)))
        for later in range(step, 14):
            assert resumed.state(later) == straight.state(later)
        part = joined(resumed.micro_batches(step, 1, 2, 2))
        assert same(part, MicroBatch(*(tensor[1::2] for tensor in dataclasses.astuple(expected[step]))))
        assert same(whole(resumed, 13), expected[13])


def test_the_state_holds_every_source_and_phase_and_nothing_of_ranks(mix):
    batches = mix(curriculum=[(2, {"pairs": 1.0, "text": 3.0}), (9, {"text": 1.0})])
    state = stored(batches.state(4))
    assert state["rows_consumed"] == 48
    assert state["phases"] == [
        {"first_row": 0, "rows_per_million": {"fine": 200_000, "pairs": 500_000, "text": 300_000}},
        {"first_row": 24, "rows_per_million": {"pairs": 250_000, "text": 750_000}},
    ]
    assert sum(source["rows_consumed"] for source in state["sources"].values()) == 48
    for name, source in state["sources"].items():
        rows = batches.rows.sources[name]
        assert source == {
            "fingerprint": rows.manifest.fingerprint,
            "plan_digest": rows.plan_digest,
            "seed": SEEDS[name],
            "epoch": rows.locate(source["rows_consumed"])[0],
            "rows_consumed": source["rows_consumed"],
        }


def test_other_weights_hold_from_the_next_row_and_are_told(mix, caplog):
    before = mix({"pairs": 0.5, "text": 0.5})
    after = mix({"pairs": 0.1, "text": 0.9})
    with caplog.at_level(logging.INFO):
        after.load_state(stored(before.state(5)))
    assert "shares of rows from row 60 on: pairs 0.1, text 0.9" in caplog.text
    assert [phase["first_row"] for phase in after.state(9)["phases"]] == [0, 60]
    assert after.rows.mixture.consumed(60) == before.rows.mixture.consumed(60)
    consumed = after.rows.mixture.consumed(160)
    assert consumed == {"pairs": 40, "text": 120}
    assert after.shares_consumed(13) == {name: count / 156 for name, count in after.rows.mixture.consumed(156).items()}
    again = mix({"pairs": 0.1, "text": 0.9})
    again.load_state(stored(after.state(8)))
    assert all(same(whole(again, step), whole(after, step)) for step in range(8, 12))


def test_the_same_weights_in_another_proportion_begin_no_phase(mix, caplog):
    with caplog.at_level(logging.INFO):
        resumed = mix({"text": 30, "fine": 20, "pairs": 50})
        resumed.load_state(stored(mix().state(3)))
    assert len(resumed.state(9)["phases"]) == 1
    assert "row" not in caplog.text


def test_a_source_comes_and_another_goes(mix, caplog):
    first = mix({"pairs": 0.5, "text": 0.5})
    second = mix({"text": 0.5, "fine": 0.5})
    with caplog.at_level(logging.INFO):
        second.load_state(stored(first.state(4)))
    assert "the source fine is new from row 48 on" in caplog.text
    assert "the source pairs is no longer read from row 48 on" in caplog.text
    assert {second.rows.mixture.locate(row)[0] for row in range(48, 120)} == {"text", "fine"}
    assert second.rows.mixture.consumed(120)["pairs"] == 24
    state = stored(second.state(8))
    assert state["sources"]["pairs"] == first.state(4)["sources"]["pairs"]
    caplog.clear()
    third = mix()  # what had gone goes on where it was left
    with caplog.at_level(logging.INFO):
        third.load_state(state)
    located = [third.rows.mixture.locate(row) for row in range(96, 140)]
    assert next(index for name, index in located if name == "pairs") == 24
    assert "is new" not in caplog.text


def test_a_run_begun_with_one_set_goes_on_as_a_mixture(folders, mix):
    plain = GlobalBatches(mix({"pairs": 1.0}).rows.sources["pairs"], BATCH)
    sources = {"ids": plain.rows.sources["ids"], "text": mix({"text": 1}).rows.sources["text"]}
    mixed = GlobalBatches(MixedRows(sources, [Asked(0, {"ids": 1, "text": 1})]), BATCH)
    mixed.load_state(stored(plain.state(3)))
    assert mixed.rows.mixture.consumed(60) == {"ids": 48, "text": 12}


def test_a_source_is_read_so_many_epochs_at_most(mix):
    batches = mix(max_epochs={"fine": 2}, total_steps=30)
    fine = batches.rows.sources["fine"]
    seen = [index for name, index in map(batches.rows.mixture.locate, range(360)) if name == "fine"]
    assert seen == list(range(fine.rows_before_epoch(2)))
    assert batches.state(30)["sources"]["fine"]["epoch"] == 2
    shares = batches.rows.mixture.phases[-1].shares
    assert shares == {"pairs": 625_000, "text": 375_000}


def test_epochs_that_no_run_comes_to_are_not_packed(mix):
    capped = mix(max_epochs={"fine": 10**9}, total_steps=30)
    assert capped.rows.limits == {}
    assert capped.state(30) == mix().state(30)


def test_too_few_rows_are_refused_with_what_to_change(mix):
    batches = mix({"text": 1.0, "fine": 1.0}, max_epochs={"text": 1, "fine": 2}, total_steps=100)
    rows = {name: batches.rows.sources[name].rows_before_epoch(epochs) for name, epochs in (("text", 1), ("fine", 2))}
    with pytest.raises(UserError) as refusal:
        batches.check_suffice(100)
    assert f"asks for 1,200 rows, but {sum(rows.values())} are available" in str(refusal.value)
    assert f"fine {rows['fine']} with max_epochs 2, text {rows['text']} with max_epochs 1" in str(refusal.value)
    assert "raise or leave out max_epochs" in str(refusal.value)
    mix({"text": 1.0, "fine": 1.0}, max_epochs={"fine": 2}, total_steps=100).check_suffice(100)


def test_another_data_set_or_plan_of_a_source_is_refused(mix, tmp_path, write_id_set):
    state = stored(mix().state(3))
    with pytest.raises(UserError, match=r"rows were packed from .*text with another seed"):
        mix(seeds=SEEDS | {"text": 9}).load_state(state)
    with pytest.raises(UserError, match=r"trained on the id set \w+, but .* give the set it was trained on"):
        write_id_set(tmp_path, SHARDS["text"][::-1])
        other = RowDataset(load_manifest(tmp_path), VOCABULARY, EOS, SEQ_LEN, SEEDS["text"], 0.3, min_block_documents=16)
        mixed = mix()
        GlobalBatches(MixedRows(mixed.rows.sources | {"text": other}, mixed.rows.asked), BATCH).load_state(state)


def test_counts_that_the_phases_do_not_give_are_refused(mix):
    state = stored(mix().state(3))
    state["sources"]["text"]["rows_consumed"] += 1
    with pytest.raises(UserError, match="mixed in another order"):
        mix().load_state(state)


def test_sources_of_different_tokenizers_are_refused(mix, tmp_path, write_id_set):
    write_id_set(tmp_path, SHARDS["fine"], visual_tokenizer="another")
    other = RowDataset(load_manifest(tmp_path), VOCABULARY, EOS, SEQ_LEN, 0, 0.3)
    with pytest.raises(UserError, match=f"visual_tokenizer is visual in .*pairs and another in {tmp_path}"):
        MixedRows(mix().rows.sources | {"other": other}, [Asked(0, WEIGHTS)])
