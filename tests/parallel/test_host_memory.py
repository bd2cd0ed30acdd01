"""Freed memory is kept: what was mapped once serves blocks that come and go."""

import subprocess
import sys

PROGRAM = """
import resource, torch
from lavit_dist.parallel.host_memory import keep_freed_memory
torch.set_num_threads(1)
{call}
def faults(mebibytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(mebibytes, 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
[faults(mebibytes) for mebibytes in (64, 256)]
print(max(faults(mebibytes) for mebibytes in (64, 40, 100, 64)))
"""


def faults(call: str) -> int:
    """The most page faults of making blocks of less than was freed before."""
    return int(subprocess.run([sys.executable, "-c", PROGRAM.format(call=call)], capture_output=True, text=True, check=True).stdout)


def test_a_block_that_comes_back_costs_no_page_faults() -> None:
    assert faults("keep_freed_memory()") < 100 < faults("")
