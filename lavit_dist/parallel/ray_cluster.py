"""The Ray cluster that a job runs on: one that is there, or one of its own on this machine."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lavit_dist.config.ray import RayConfig
from lavit_dist.errors import UserError, check

logger = logging.getLogger(__name__)
MEBIBYTE = 2**20
SECONDS_FOR_NODES = 300
ROUNDING = 1e-6
LOOPBACK = "127.0.0.1"


@contextmanager
def ray_cluster(config: RayConfig) -> Iterator[None]:
    """Connects to the cluster that the settings name, or starts Ray on this machine, and leaves or ends it."""
    # Ray reads these when it is imported. It sends usage reports to its makers, and outside Windows and macOS it listens on all
    # interfaces even if it serves this machine alone; the second variable makes it treat Linux like those two.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if config.address is None:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    if config.address is None:
        context = ray.init(
            address="local",
            num_cpus=config.num_cpus or len(os.sched_getaffinity(0)),
            object_store_memory=config.object_store_mb * MEBIBYTE,
            include_dashboard=config.dashboard,
            dashboard_host=LOOPBACK,
            logging_level=logging.ERROR,
            # by default actors give way to all other processes, and starve on a busy machine
            _system_config={"worker_niceness": 0},
        )
        if config.dashboard:
            logger.info("Ray's dashboard is at http://%s", context.dashboard_url)
    else:
        try:
            ray.init(address=config.address, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"No Ray cluster can be reached at ray.address {config.address} ({error}); start one there, or leave it out to run here."
            ) from error
    try:
        _wait_for_nodes(config)
        yield
    finally:
        ray.shutdown()


def nodes_of_cluster() -> list[dict[str, float]]:
    """What each living node has: CPU, GPU and so on."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def room_for(cpus: float, gpus: float) -> int:
    """How many actors with so many CPUs and GPUs each the nodes of the cluster have room for."""
    fitting = 0
    for has in nodes_of_cluster():
        rooms = [has.get(name, 0) / amount + ROUNDING for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount]
        fitting += int(min(rooms))
    return fitting


def check_room(cpus: float, gpus: float) -> None:
    """Raises `UserError` when no node has room for one actor."""
    check(
        room_for(cpus, gpus) > 0,
        f"No node of the Ray cluster has the {cpus:g} CPUs and {gpus:g} GPUs of one actor and its helpers; lower"
        " ray.cpus_per_actor, ray.gpus_per_actor or what the job starts beside it, or use larger nodes.",
    )


def _wait_for_nodes(config: RayConfig) -> None:
    """Waits until the cluster has as many nodes as the settings ask for; raises `UserError` when they don't come."""
    import ray

    deadline = time.monotonic() + SECONDS_FOR_NODES
    while (nodes := sum(node["Alive"] for node in ray.nodes())) < config.min_nodes:
        check(
            time.monotonic() < deadline,
            f"The Ray cluster has {nodes} nodes after {SECONDS_FOR_NODES} seconds, fewer than ray.min_nodes {config.min_nodes};"
            " look into the logs of the missing ones, or ask for less.",
        )
        time.sleep(1)
