"""Errors of fetching as callers meet them; attempts and waits are tested where shards are fetched."""

import errno
import pickle

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from lavit_dist.data.fetch import FetchError, fetch


def test_what_a_store_said_reaches_another_process():
    error = pickle.loads(pickle.dumps(FetchError("after 5 attempts: OSError: 503 Slow Down", False)))
    assert (str(error), error.missing) == ("after 5 attempts: OSError: 503 Slow Down", False)


def test_a_full_disk_is_not_the_stores_fault(tmp_path):
    class Full(MemoryFileSystem):
        def get_file(self, *_args, **_options):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fetch(Full(), "/a", tmp_path / "a", attempts=3, first_wait=60, flaw=lambda _: None)
