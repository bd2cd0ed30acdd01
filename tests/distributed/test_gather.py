"""Gathering rows of which every rank has another number, none included."""

import json
from pathlib import Path

RANKS = 3


def test_uneven_rows_arrive_whole_and_in_rank_order(run_ranks, tmp_path):
    run_ranks(Path(__file__).with_name("gather_on_ranks.py"), RANKS, str(tmp_path))
    for rank in range(RANKS):
        gathered = json.loads((tmp_path / f"{rank}.json").read_text())
        assert gathered["rows"] == [[1, 0], [2, 0], [2, 1]]
        assert gathered["objects"] == [{"rank": other} for other in range(RANKS)]
