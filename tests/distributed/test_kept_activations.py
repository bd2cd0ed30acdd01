"""Recomputation and sequence parallelism keep fewer activations; that they change no number is tested by the layouts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.kept_on_ranks import MODEL, SEQ_LEN

RANKS = 2
pytestmark = pytest.mark.xdist_group("kept activations")  # one run for all


@pytest.fixture(scope="module")
def kept(run_ranks: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Bytes by setting, and the number of compiled graphs."""
    out = tmp_path_factory.mktemp("kept") / "kept.json"
    run_ranks(Path(__file__).with_name("kept_on_ranks.py"), RANKS, str(out))
    found: dict[str, int] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("suffix", ["", " sequence parallel"])
def test_the_more_is_recomputed_the_less_is_kept(kept: dict[str, int], suffix: str) -> None:
    in_order = [kept[f"{mode}{suffix}"] for mode in ("none 1", "selective 1", "full 2", "full 1")]
    assert in_order == sorted(in_order, reverse=True)
    assert len(set(in_order)) == len(in_order)
    assert kept[f"full 2{suffix}"] < 0.6 * kept[f"none 1{suffix}"]


def test_sequence_parallel_ranks_keep_shares(kept: dict[str, int]) -> None:
    assert kept["none 1 sequence parallel"] < 0.9 * kept["none 1"]


def test_gathering_twice_keeps_shares_of_inputs_too(kept: dict[str, int]) -> None:
    inputs = 2 * MODEL.num_layers * SEQ_LEN * MODEL.hidden_size * 4
    more = kept["none 1 sequence parallel"] - kept["none 1 sequence parallel, gather twice"]
    assert more >= inputs * (RANKS - 1) // RANKS


def test_blocks_are_compiled_once_for_all_documents(kept: dict[str, int]) -> None:
    assert 0 < kept["graphs"] == kept["graphs in all"]
