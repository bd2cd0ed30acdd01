"""Settings that every offline Ray job shares: which cluster, and how much of it."""

from __future__ import annotations

from lavit_dist.config.base import config
from lavit_dist.errors import check


@config
class RayConfig:
    """Where a job runs. Nothing here changes what it computes."""

    address: str | None = None
    """Address of a running cluster, such as 10.0.0.1:6379, or `auto` to find it; None starts Ray on this machine, on the loopback only."""
    min_nodes: int = 1
    """Nodes of the cluster to wait for before work starts; later ones are not used."""
    num_cpus: int | None = None
    """CPUs that a Ray started here may use; None takes all that this process may."""
    object_store_mb: int = 200
    """Shared memory of a Ray started here, MiB; shards travel through files, so it holds little."""
    num_actors: int | None = None
    """Processes that work at a time; None starts as many as the cluster has room for."""
    cpus_per_actor: int = 1
    """CPU threads of each."""
    gpus_per_actor: float = 0.0
    """GPUs of each; 0 computes on the CPU."""
    max_retries: int = 2
    """How often a shard is tried again after an error or the death of its process."""

    def validate(self) -> None:
        for name in ("min_nodes", "num_cpus", "num_actors", "cpus_per_actor"):
            value = getattr(self, name)
            check(value is None or value > 0, f"ray.{name} {value} must be at least 1.")
        check(
            self.address is not None or self.min_nodes == 1,
            f"ray.min_nodes {self.min_nodes} needs a cluster; give its address as ray.address, or leave ray.min_nodes at 1.",
        )
        check(self.gpus_per_actor >= 0, f"ray.gpus_per_actor {self.gpus_per_actor} must not be negative.")
        check(self.max_retries >= 0, f"ray.max_retries {self.max_retries} must not be negative.")
        check(
            self.object_store_mb >= 80, f"ray.object_store_mb {self.object_store_mb} must be at least 80, as Ray itself requires."
        )
