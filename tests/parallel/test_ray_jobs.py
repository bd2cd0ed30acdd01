"""Jobs on real Ray actors: each ends once, failures are tried again, and what can't succeed is named."""

import dataclasses
import os
import time
from pathlib import Path

import pytest

from lavit_dist.config.ray import RayConfig
from lavit_dist.errors import UserError
from lavit_dist.parallel import ray_cluster as ray_clusters
from lavit_dist.parallel.ray_cluster import ray_cluster, room_for
from lavit_dist.parallel.ray_helpers import RETRIES, Helpers
from lavit_dist.parallel.ray_jobs import MAX_DEATHS, Share, run_jobs

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

        def stop(self) -> None:
            (self.folder / f"stopped {os.getpid()}").touch()

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
    assert len((tmp_path / "dies always").read_text()) == MAX_DEATHS + 1


def test_a_mistake_that_the_workers_find_is_the_users(tmp_path):
    with pytest.raises(UserError, match="the model is missing"):
        list(run_jobs(make_worker(), (tmp_path, True), {"job": "job"}, CONFIG))


def test_actors_that_fit_nowhere_are_refused(tmp_path):
    config = RayConfig(num_cpus=2, cpus_per_actor=3)
    with pytest.raises(UserError, match="No node of the Ray cluster has the 3 CPUs and 0 GPUs"):
        list(run_jobs(make_worker(), (tmp_path, False), {"job": "job"}, config))


def test_an_actor_does_several_jobs_at_a_time_and_tells_how_far_it_is(tmp_path):
    class Meeting:
        def __init__(self) -> None:
            import threading

            self.both, self.done = threading.Barrier(2), 0

        def start(self) -> None:
            pass

        def run(self, job: str) -> None:
            self.both.wait(60)  # until the other job is being done too
            self.done += 1

        def progress(self) -> int:
            return self.done

        def stop(self) -> None:
            pass

    told: list[int] = []
    share = Share(cpus=2, jobs_at_a_time=2)
    list(run_jobs(Meeting, (), dict.fromkeys("abcd"), CONFIG, share, lambda said, up: told.append(up)))
    assert max(told) == 1


def test_a_full_disk_ends_the_run(tmp_path):
    class Unlucky:
        def start(self) -> None:
            pass

        def run(self, job: str) -> None:
            raise OSError(28, "No space left on device", "/full/shard.arrow")

        def stop(self) -> None:
            pass

    with pytest.raises(UserError, match=r"job could not be written: No space left on device \(/full/shard.arrow\)"):
        list(run_jobs(Unlucky, (), {"job": None}, CONFIG))


def test_helpers_start_again_when_they_die_and_what_kills_them_always_is_told(tmp_path):
    class Mortal:
        def __init__(self, folder: Path) -> None:
            self.folder = folder

        def do(self, what: str) -> str:
            with (self.folder / what).open("a") as file:
                file.write("x")
            if what == "always" or (what == "once" and len((self.folder / what).read_text()) == 1):
                os._exit(1)
            return what

    class Owner:
        def __init__(self, folder: Path) -> None:
            self.folder = folder

        def start(self) -> None:
            self.helpers = Helpers(Mortal, (self.folder,), 1, 0)

        def run(self, job: str) -> str:
            from ray.exceptions import RayActorError

            calls = [self.helpers.call("do", what) for what in ("fine", job, "fine")]
            try:
                return " ".join(call.result() for call in calls)
            except RayActorError:
                return "told"

        def stop(self) -> None:
            pass

    outcomes = run_jobs(Owner, (tmp_path,), {name: name for name in ("fine", "once", "always")}, CONFIG)
    assert {outcome.name: outcome.result for outcome in outcomes} == {
        "fine": "fine fine fine",
        "once": "fine once fine",
        "always": "told",
    }
    assert len((tmp_path / "always").read_text()) == RETRIES + 1


def test_an_actor_that_is_out_of_order_costs_no_job(tmp_path):
    class Cursed:
        """The first that starts raises in every job, as one does whose GPU has a sticky error."""

        def __init__(self, folder: Path) -> None:
            self.folder = folder

        def start(self) -> None:
            try:
                (self.folder / "cursed").touch(exist_ok=False)
                self.cursed = True
            except FileExistsError:
                self.cursed = False

        def run(self, job: str) -> None:
            if self.cursed:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

        def stop(self) -> None:
            pass

    config = RayConfig(num_cpus=2, num_actors=1, max_retries=1, object_store_mb=80)
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcomes = list(
            run_jobs(Cursed, (folder,), dict.fromkeys(map(str, range(12))), dataclasses.replace(config, num_actors=number))
        )
        assert len(outcomes) == 12
        assert [outcome.error for outcome in outcomes] == [None] * 12


def test_an_actor_that_cannot_start_holds_up_no_other(tmp_path):
    class Late:
        """All but the first that starts find no room."""

        def __init__(self, folder: Path) -> None:
            self.folder = folder

        def start(self) -> None:
            try:
                (self.folder / "first").touch(exist_ok=False)
            except FileExistsError:
                while not (self.folder / "done").exists():
                    time.sleep(0.01)
                raise UserError("cache_folder /full can't be written") from None

        def run(self, job: str) -> None:
            (self.folder / "done").touch()
            time.sleep(0.5)

        def stop(self) -> None:
            pass

    outcomes = list(run_jobs(Late, (tmp_path,), dict.fromkeys("abcdef"), CONFIG))
    assert [outcome.error for outcome in outcomes] == [None] * 6


@pytest.mark.parametrize(("share", "fitting"), [(0.1, 10), (0.2, 5), (0.3, 3), (0.5, 2), (1, 1), (2, 0)])
def test_parts_of_a_gpu_are_all_used(monkeypatch, share, fitting):
    monkeypatch.setattr(ray_clusters, "nodes_of_cluster", lambda: [{"CPU": 64.0, "GPU": 1.0}, {"CPU": 8.0}])
    assert room_for(1, share) == fitting
    assert room_for(0.1, 0) == 720
