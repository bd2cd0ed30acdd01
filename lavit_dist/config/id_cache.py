"""Where shards of ids that lie in a store are kept."""

from __future__ import annotations

from dataclasses import field

from pydantic import PositiveInt

from lavit_dist.config.base import config


@config
class IdCacheConfig:
    """The local folder of fetched shards of ids, shared by the processes of a host and by runs. Local sets are read in place."""

    folder: str | None = None
    """Folder of fetched shards, best on a local disk; None takes ~/.cache/lavit_dist/ids. It stays when a run ends."""
    bytes: PositiveInt = 1 << 36
    """Room in the folder, bytes; the shards that were used least recently give way, those that are being read never do."""
    attempts: PositiveInt = 8
    """How often a shard is tried before the run stops; the wait between tries doubles from one second, to two minutes in all."""
    storage_options: dict[str, str | int | float | bool | None] = field(default_factory=dict)
    """What fsspec's file system is opened with, such as `anon` or `endpoint_url`; credentials belong into its own files."""
