"""Jobs on real Ray actors: each ends once, failures are tried again, and what can't succeed is named."""

import os
from pathlib import Path

import pytest

from lavit_dist.config.ray import RayConfig
from lavit_dist.errors import UserError
from lavit_dist.parallel.ray_jobs import ray_cluster, run_jobs

CONFIG = RayConfig(num_cpus=2, num_actors=2, max_retries=1, object_store_mb=80)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with ray_cluster(CONFIG):
        yield


def make_worker():
    """A class that Ray sends by value: the actors can't import this file."""

    class Clumsy:
        def __init__(self, folder: Path, broken: bool) -> None:
            self.folder, self.broken = folder, broken

        def start(self) -> None:
            if self.broken:
                raise UserError("the model is missing")

        def run(self, job: str) -> int:
            with (self.folder / job).open("a") as file:
                file.write("x")
            tries = len((self.folder / job).read_text())
            if job == "dies once" and tries == 1:
                os._exit(1)
            if job == "dies always":
                os._exit(1)
            if job == "raises always" or (job == "raises once" and tries == 1):
                raise OSError("disk on fire")
            return tries

    return Clumsy


def test_jobs_end_once_each_whatever_happens(tmp_path):
    names = ["raises once", "dies once", "raises always", "dies always", *(f"good {index}" for index in range(4))]
    outcomes = list(run_jobs(make_worker(), (tmp_path, False), {name: name for name in names}, CONFIG))
    assert sorted(outcome.name for outcome in outcomes) == sorted(names)
    by_name = {outcome.name: outcome for outcome in outcomes}
    assert {name: outcome.result for name, outcome in by_name.items() if outcome.error is None} == {
        "raises once": 2,
        "dies once": 2,
        **{f"good {index}": 1 for index in range(4)},
    }
    assert by_name["raises always"].error == "OSError: disk on fire"
    assert "Actor" in by_name["dies always"].error
    assert len((tmp_path / "dies always").read_text()) == 2


def test_a_mistake_that_the_workers_find_is_the_users(tmp_path):
    with pytest.raises(UserError, match="the model is missing"):
        list(run_jobs(make_worker(), (tmp_path, True), {"job": "job"}, CONFIG))


def test_actors_that_fit_nowhere_are_refused(tmp_path):
    config = RayConfig(num_cpus=2, cpus_per_actor=3)
    with pytest.raises(UserError, match=r"No node of the Ray cluster has ray\.cpus_per_actor 3"):
        list(run_jobs(make_worker(), (tmp_path, False), {"job": "job"}, config))
