"""Reading ahead changes when data is read, never what."""

import threading
import time

import pytest

from lavit_dist.data.global_batches import GlobalBatches
from lavit_dist.data.read_ahead import ReadAhead
from lavit_dist.data.rows import RowDataset
from lavit_dist.models.vocabulary import Vocabulary


def test_the_next_step_is_read_while_this_one_is_computed():
    read = []
    began = threading.Event()

    def reader(step):
        read.append((step, threading.current_thread().name))
        if step == 1:
            began.set()
        return 10 * step

    ahead = ReadAhead(reader, 3)
    assert ahead(0) == 0
    assert began.wait(10)  # nobody has asked for step 1
    assert [ahead(1), ahead(2)] == [10, 20]
    time.sleep(0.1)
    assert [step for step, _ in read] == [0, 1, 2]  # and step 3 is beyond the end
    assert len({thread for _, thread in read}) == 1
    assert threading.current_thread().name not in {thread for _, thread in read}


def test_nothing_is_read_once_it_is_forgotten():
    reading, over = threading.Event(), threading.Event()

    def reader(step):
        if step == 1:
            reading.set()
            time.sleep(0.1)
            over.set()
        return step

    ahead = ReadAhead(reader, 10)
    ahead(0)
    assert reading.wait(10)
    ahead.forget()
    assert over.is_set()


def test_any_order_of_steps_gives_each_its_own():
    ahead = ReadAhead(lambda step: step, 100)
    assert [ahead(step) for step in (5, 6, 2, 3, 3, 99, 100, 7)] == [5, 6, 2, 3, 3, 99, 100, 7]


def test_what_was_read_of_other_data_is_forgotten():
    data = ["old"]
    ahead = ReadAhead(lambda step: (data[0], step), 10)
    assert ahead(0) == ("old", 0)
    data[0] = "new"
    ahead.forget()
    assert ahead(1) == ("new", 1)


def test_a_failure_is_raised_by_the_step_that_has_it():
    def reader(step):
        if step == 2:
            raise ValueError("step 2")
        return step

    ahead = ReadAhead(reader, 10)
    assert [ahead(0), ahead(1)] == [0, 1]
    with pytest.raises(ValueError, match="step 2"):
        ahead(2)
    assert ahead(3) == 3


def test_the_state_can_be_asked_for_while_rows_are_read(tmp_path, write_id_set):
    """Both come to epochs that nobody has planned yet."""
    manifest = write_id_set(tmp_path, [[(9, 4)] * 20] * 3)
    batches, alone = (GlobalBatches(RowDataset(manifest, Vocabulary(50, 70), 0, 48, 0, 0.1), 4) for _ in range(2))
    ahead = ReadAhead(lambda step: batches.micro_batches(step, 0, 1, 4)[0].tokens, 200)
    for step in range(60):
        tokens = ahead(step)
        assert batches.state(step + 1) == alone.state(step + 1)
        assert tokens.equal(alone.micro_batches(step, 0, 1, 4)[0].tokens)
