"""Parquet files of metadata as shards of rows."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.data.url_table import UrlTable
from lavit_dist.errors import UserError


@given(
    rows=st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any),
    row_group_size=st.integers(1, 5),
    samples_per_shard=st.integers(1, 9),
    data=st.data(),
)
def test_shards_are_the_rows_in_order_whatever_files_and_row_groups_they_lie_in(
    tmp_path_factory, rows, row_group_size, samples_per_shard, data
):
    folder = tmp_path_factory.mktemp("metadata")
    total = sum(rows)
    starts = [sum(rows[:number]) for number in range(len(rows))]
    for number, (start, count) in enumerate(zip(starts, rows, strict=True)):
        values = range(start, start + count)
        columns = {"id": pa.array(values, pa.int64()), "URL": pa.array(map(str, values), pa.string())}
        columns["TEXT"] = pa.array([None if value % 3 else f"caption {value}" for value in values], pa.string())
        pq.write_table(pa.table(columns), folder / f"{number}.parquet", row_group_size=row_group_size)
    table = UrlTable(str(folder), "URL", "TEXT", None, samples_per_shard)
    assert len(table) == total
    wanted = data.draw(st.sets(st.integers(0, table.shards - 1)))
    found = {shard: rows.to_pylist() for shard, rows in table.read_shards(wanted)}
    assert found == {
        shard: [
            {"row": row, "url": str(row), "caption": None if row % 3 else f"caption {row}", "metadata": {"id": row}}
            for row in range(shard * samples_per_shard, min(total, (shard + 1) * samples_per_shard))
        ]
        for shard in wanted
    }


def test_no_further_columns_and_a_pattern(tmp_path):
    for name in ("a.parquet", "b.parquet", "c.other"):
        pq.write_table(pa.table({"u": [name], "t": ["x"]}), tmp_path / name)
    table = UrlTable(str(tmp_path / "[ab].par*"), "u", "t", (), 10)
    assert [row["url"] for _, rows in table.read_shards([0]) for row in rows.to_pylist()] == ["a.parquet", "b.parquet"]


def test_columns_may_differ_in_type_as_far_as_one_type_holds_all(tmp_path):
    for name, ids, extra in (("a", [1], ["x"]), ("b", [2.5], [None])):
        pq.write_table(pa.table({"URL": ["u"], "TEXT": ["t"], "id": ids, "extra": extra}), tmp_path / f"{name}.parquet")
    table = UrlTable(str(tmp_path), "URL", "TEXT", None, 10)
    assert [row["metadata"] for _, rows in table.read_shards([0]) for row in rows.to_pylist()] == [
        {"id": 1.0, "extra": "x"},
        {"id": 2.5, "extra": None},
    ]
    pq.write_table(pa.table({"URL": ["u"], "TEXT": ["t"], "id": ["three"], "extra": ["y"]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"don't agree on the types of a column .*id.*; name others in `columns`"):
        UrlTable(str(tmp_path), "URL", "TEXT", None, 10)
    assert len(UrlTable(str(tmp_path), "URL", "TEXT", ("extra",), 10)) == 3
