"""Settings that every offline Ray job shares: which cluster, and how much of it."""

from __future__ import annotations

from lavit_dist.config.base import config
from lavit_dist.errors import check


@config
class RayConfig:
    """Where a job runs. Nothing here changes what it computes, but for the rounding of a GPU beside that of a CPU."""

    address: str | None = None
    """Address of a running cluster, such as 10.0.0.1:6379, or `auto` to find it; None starts Ray on this machine, on the loopback only."""
    min_nodes: int = 1
    """Nodes of the cluster to wait for before work starts; later ones are used as they come."""
    num_cpus: int | None = None
    """CPUs that a Ray started here may use; None takes all that this process may."""
    object_store_mb: int = 500
    """Shared memory of a Ray started here, MiB; it holds what is under way between processes, such as decoded pictures."""
    dashboard: bool = False
    """Whether a Ray started here serves its dashboard, on the loopback only; it takes the package ray[default]."""
    num_actors: int | None = None
    """Processes that work at a time; None starts as many as the cluster has room for, and more as it grows. With a number those that
    have no room yet are what an autoscaling cluster is asked for."""
    cpus_per_actor: int = 1
    """CPU threads of each, and what it counts as on its node."""
    gpus_per_actor: float = 0.0
    """GPUs of each, also a part of one; 0 computes on the CPU."""
    max_retries: int = 2
    """How often a shard is tried again after an error. After the death of a process it is tried more often: that is rarely its fault."""

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


@config
class DecodingRayConfig(RayConfig):
    """Where a job runs that decodes pictures beside what computes on them."""

    decoders_per_actor: int | None = None
    """Processes that decode pictures for each actor, on its node. None: with GPUs, what CPUs the GPU's share of the node leaves; else one."""
    cpus_per_decoder: float | None = None
    """What each counts as on its node. None: 1 with GPUs; else 0, for beside a model on the CPU it has little to do."""

    def validate(self) -> None:
        super().validate()
        check(
            self.decoders_per_actor is None or self.decoders_per_actor > 0,
            f"ray.decoders_per_actor {self.decoders_per_actor} must be at least 1.",
        )
        check(
            self.cpus_per_decoder is None or self.cpus_per_decoder >= 0,
            f"ray.cpus_per_decoder {self.cpus_per_decoder} must not be negative.",
        )
