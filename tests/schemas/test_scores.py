from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smpo_schemas.scoring.scores import IMAGE_IDS, ScoresInfo, image_ids, read_scores, score_schema, write_part
from tests.schemas.helpers import statistics


def test_statistics_by_hand():
    found = statistics([[0.0, 1.0], [3.0, 2.0], [1.0, 1.0], [4.0, 0.0]], [0.0, 0.0, 1.0, 0.5])
    assert (found.min, found.max, found.mean) == (0.0, 4.0, 1.5)
    assert found.std == pytest.approx(math.sqrt(np.mean((np.array([0, 1, 3, 2, 1, 1, 4, 0]) - 1.5) ** 2)))
    # Three labels are decided; the reward orders the first alike (equal scores do not count as agreement).
    assert (found.agreement, found.num_labelled) == (pytest.approx(1 / 3), 3)
    assert statistics([[0.0, 1.0]]).agreement is None


def test_a_table_without_image_ids_is_read(tmp_path):
    row = {"pair_id": "a", "prompt": "x", "label": 1.0, "annotator": None, "r_0": 0.0, "r_1": 1.0}
    new = write_part(tmp_path / "new.parquet", [row | {"image_0_id": "p", "image_1_id": "q"}], ["r"])
    old_schema = pa.schema(
        [field for field in score_schema(["r"]) if not field.name.endswith("_id") or field.name == "pair_id"]
    )
    pq.write_table(pa.Table.from_pylist([row], schema=old_schema), tmp_path / "old.parquet")
    old = new.model_copy(update={"name": "old.parquet"})
    info = ScoresInfo(schema_version=1, rewards={"r": statistics([[0.0, 1.0]])}, parts=[new], scored=1, rejected=0)
    assert image_ids(read_scores(tmp_path, info)).tolist() == [["p", "q"]]
    both = read_scores(tmp_path, info.model_copy(update={"parts": [new, old]}))
    assert both["pair_id"].to_pylist() == ["a", "a"]
    assert image_ids(both) is None
    before = info.model_copy(update={"parts": [old]})
    assert image_ids(read_scores(tmp_path, before)) is None
    assert read_scores(tmp_path, before, ["pair_id", *IMAGE_IDS]).column_names == ["pair_id"]
