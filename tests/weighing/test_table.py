"""The column in a table of several parts; a kill leaves the old table or the new one."""

from __future__ import annotations

import numpy as np
import pytest

from smpo_pipeline.weighing import table as weighing_table
from smpo_pipeline.weighing.table import write_column
from smpo_schemas.scoring.scores import read_scores, read_scores_info, write_part, write_scores_info
from tests.calibration.helpers import write_scores


@pytest.fixture
def scores(tmp_path):
    """Two parts of two rows."""
    folder = write_scores(tmp_path / "s", {"one": np.eye(2)}, [1.0, 0.0], ["a", "b"])
    info = read_scores_info(folder)
    rows = [{"pair_id": f"q{row}", "prompt": "c", "one_0": 0.0, "one_1": 1.0} for row in range(2)]
    parts = [*info.parts, write_part(folder / "scores-000001.parquet", rows, ["one"])]
    write_scores_info(folder, info.model_copy(update={"parts": parts, "scored": 4}))
    return folder


def weights(folder, column="w"):
    return read_scores(folder, read_scores_info(folder))[column].to_pylist()


def test_each_part_gets_its_rows_and_nan_is_null(scores):
    write_column(scores, read_scores_info(scores), "w", np.array([1.0, np.nan, 0.5, 2.0]))
    assert weights(scores) == [1.0, None, 0.5, 2.0]
    write_column(scores, read_scores_info(scores), "v", np.arange(4.0))
    write_column(scores, read_scores_info(scores), "w", np.arange(4.0) + 4)
    table = read_scores(scores, read_scores_info(scores))
    assert table.column_names[-2:] == ["w", "v"]
    assert (weights(scores), weights(scores, "v")) == ([4.0, 5.0, 6.0, 7.0], [0.0, 1.0, 2.0, 3.0])


def test_a_kill_leaves_the_old_table(scores, monkeypatch):
    write_column(scores, read_scores_info(scores), "w", np.ones(4))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(weighing_table, "write_scores_info", killed)
        with pytest.raises(KeyboardInterrupt):
            write_column(scores, read_scores_info(scores), "w", np.arange(4.0))
    assert weights(scores) == [1.0] * 4
    with monkeypatch.context() as patch:
        patch.setattr(weighing_table, "remove_leftovers", killed)
        with pytest.raises(KeyboardInterrupt):
            write_column(scores, read_scores_info(scores), "w", np.arange(4.0))
    assert weights(scores) == [0.0, 1.0, 2.0, 3.0]
    write_column(scores, read_scores_info(scores), "w", np.arange(4.0) + 1)
    assert {path.name for path in scores.glob("scores-*")} == {part.name for part in read_scores_info(scores).parts}
