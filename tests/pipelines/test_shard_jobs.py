"""Which shards are there already: those alone that are whole and made of the same inputs."""

import dataclasses

import fsspec
import pytest

from lavit_dist.data.id_folder import IdFolder
from lavit_dist.data.id_shard import IMAGE, TEXT, IdDocument, InputFile, Outcomes
from lavit_dist.data.id_shard_writer import commit_batch, to_batch
from lavit_dist.data.shard_list import Shard
from pipelines.shard_jobs import ShardJob, find_finished
from tests.data.id_sets import ENCODING


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    return IdFolder.of(tmp_path if request.param == "local" else f"memory://ids-{tmp_path.name}", {})


def commit(folder: IdFolder) -> ShardJob:
    documents = [IdDocument(f"{place}", 0, ((IMAGE, [1]), (TEXT, [2])), b"\0", "c", ("0.tar", place, 9)) for place in range(5)]
    inputs = [InputFile("0.tar", 100, "digest")]
    commit_batch(
        folder, "shard.arrow", to_batch(documents, ENCODING), encoding=ENCODING, inputs=inputs, outcomes=Outcomes(5), quarantined=[]
    )
    return ShardJob(folder, "train", "shard.arrow", (Shard("0.tar", "/0.tar", 100),))


def is_finished(job: ShardJob) -> bool:
    return bool(find_finished([job], ENCODING, verify_inputs=False))


@pytest.mark.parametrize(("size", "finished"), [(100, True), (None, True), (101, False)])
def test_inputs_of_another_size_are_others_and_a_store_need_not_tell_it(folder, size, finished):
    job = commit(folder)
    assert is_finished(dataclasses.replace(job, inputs=(Shard("0.tar", "/0.tar", size),))) is finished


def test_a_shard_that_was_cut_short_is_made_again(folder):
    job = commit(folder)
    whole = folder.read("shard.arrow")
    folder.write("shard.arrow", whole[:-1])
    assert not is_finished(job)
    folder.write("shard.arrow", whole)
    assert is_finished(job)
    folder.remove("shard.json")
    assert not is_finished(job)
    fsspec.filesystem("memory").store.clear()
