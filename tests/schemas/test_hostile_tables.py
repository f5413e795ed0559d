"""Damaged or hostile tables of scores and rejects: findings of ``python -m tests.fuzz``."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smpo_common.errors import UserError
from smpo_common.files import write_json
from smpo_schemas.rejects import Reject, read_rejects, write_rejects
from smpo_schemas.scoring.scores import (
    SCORES_FILE,
    SCORES_VERSION,
    ScoresInfo,
    read_scores,
    read_scores_info,
    reward_scores,
    write_part,
    write_scores_info,
)
from tests.schemas.helpers import statistics

ROWS = [
    {"pair_id": f"p{row}", "prompt": "x", "label": None, "annotator": "me", "a_0": 0.5, "a_1": 0.25} for row in range(3)
]


@pytest.fixture
def changed(tmp_path):
    """Write a scores table with a column replaced or removed; return a function that reads it."""
    part = write_part(tmp_path / "scores-0.parquet", ROWS, ["a"])
    rewards = {"a": statistics([[0.5, 0.25]])}
    info = ScoresInfo(schema_version=SCORES_VERSION, rewards=rewards, parts=[part], scored=3, rejected=0)
    write_scores_info(tmp_path, info)

    def change(name: str, values: pa.Array | None, columns=None) -> pa.Table:
        table = pq.ParquetFile(tmp_path / part.name).read()
        position = table.column_names.index(name)
        table = table.remove_column(position) if values is None else table.set_column(position, name, values)
        pq.write_table(table, tmp_path / part.name)
        return read_scores(tmp_path, read_scores_info(tmp_path), columns)

    return change


@pytest.mark.parametrize("name", ["pair_id", "prompt", "label", "annotator", "a_0"])
def test_a_column_that_is_missing_or_of_another_type_is_one_line(changed, name):
    with pytest.raises(UserError, match=r"scores-0\.parquet cannot be read"):
        changed(name, pa.array([{"a": 1}] * 3))
    if name in ("label", "annotator"):
        assert changed(name, None)[name].to_pylist() == [None] * 3
    else:
        with pytest.raises(UserError, match=f"no column {name}"):
            changed(name, None)


def test_text_that_is_not_utf8_is_one_line(changed):
    with pytest.raises(UserError, match="cannot be read"):
        changed("annotator", pa.array([b"\xff"] * 3, pa.binary()).view(pa.string()))


def test_columns_of_other_widths_are_read(changed):
    table = changed("a_0", pa.array([0.5, 1.5, 2.5], pa.float64()))
    np.testing.assert_array_equal(reward_scores(table, "a")[:, 0], [0.5, 1.5, 2.5])
    table = changed("prompt", pa.array(["x", "y", "x"]).dictionary_encode(), ["prompt"])
    assert table["prompt"].to_pylist() == ["x", "y", "x"]


@pytest.mark.parametrize("name", ["../scores-0.parquet", "/etc/passwd", "a/b", ""])
def test_parts_lie_beside_their_record(changed, tmp_path, name):
    changed("label", pa.array([1.0, 0.0, None]))
    info = json.loads((tmp_path / SCORES_FILE).read_text())
    info["parts"][0]["name"] = name
    write_json(tmp_path / SCORES_FILE, info)
    with pytest.raises(UserError, match=r"malformed: parts\.0\.name"):
        read_scores_info(tmp_path)


def test_statistics_are_finite(changed, tmp_path):
    changed("label", pa.array([1.0, 0.0, None]))
    info = json.loads((tmp_path / SCORES_FILE).read_text())
    for value in (float("nan"), float("inf")):
        info["rewards"]["a"]["max"] = value
        (tmp_path / SCORES_FILE).write_text(json.dumps(info))
        with pytest.raises(UserError, match=r"malformed: rewards\.a\.max"):
            read_scores_info(tmp_path)


def test_damaged_rejects_are_one_line(tmp_path):
    path = tmp_path / "rejected.parquet"
    write_rejects(path, [Reject(pair_id=None, source="a:1", stage="score", reason="r")])
    assert len(read_rejects(path)) == 1
    whole, table = path.read_bytes(), pq.ParquetFile(path).read()
    for content in (b"", b"PAR1", whole[:-20] + whole[-19:], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"rejected\.parquet"):
            read_rejects(path)
    for values in (pa.array([None], pa.string()), pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64()))):
        pq.write_table(table.set_column(1, "source", values), path)
        with pytest.raises(UserError, match=r"rejected\.parquet"):
            read_rejects(path)
    with pytest.raises(UserError, match="nothing"):
        read_rejects(tmp_path / "nothing.parquet")
