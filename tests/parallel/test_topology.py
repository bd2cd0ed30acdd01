"""The layout: every rank has one place, and groups along each axis partition the ranks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.config.pretrain import ParallelConfig
from lavit_dist.errors import UserError
from lavit_dist.parallel.topology import Layout, deepspeed_topology

sizes = st.integers(1, 4)
layouts = st.builds(Layout, tensor_size=sizes, pipe_size=sizes, data_size=sizes)


@given(layouts)
def test_places_and_ranks_are_one_to_one(layout: Layout) -> None:
    places = {layout.coordinates(rank) for rank in range(layout.world_size)}
    assert len(places) == layout.world_size
    assert all(layout.rank(layout.coordinates(rank)) == rank for rank in range(layout.world_size))


@given(layouts, st.sampled_from(["tensor", "data", "pipe"]))
def test_groups_along_an_axis_partition_the_ranks(layout: Layout, axis: str) -> None:
    groups = {tuple(layout.peers(rank, axis)) for rank in range(layout.world_size)}
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    assert {len(group) for group in groups} == {getattr(layout, f"{axis}_size")}


@given(layouts)
def test_deepspeed_lays_ranks_out_alike(layout: Layout) -> None:
    topology = deepspeed_topology(layout)
    for rank in range(layout.world_size):
        theirs, ours = topology.get_coord(rank), layout.coordinates(rank)
        assert (theirs.pipe, theirs.data, theirs.model) == (ours.pipe, ours.data, ours.tensor)


def test_tensor_is_fastest_and_pipe_outermost() -> None:
    layout = Layout(tensor_size=2, pipe_size=2, data_size=2)
    assert layout.peers(0, "tensor") == [0, 1]
    assert layout.peers(0, "data") == [0, 2]
    assert layout.peers(0, "pipe") == [0, 4]


def test_processes_that_cant_be_shared_out_are_refused() -> None:
    parallel = ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2)
    assert Layout.of(parallel, 8) == Layout(tensor_size=2, pipe_size=2, data_size=2)
    with pytest.raises(UserError, match="start a multiple of 4"):
        Layout.of(parallel, 6)
