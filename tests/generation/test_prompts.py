from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smpo_common.errors import UserError
from smpo_pipeline.generation.prompts import PromptRow, read_prompt_file


def test_distinct_prompts_and_rows_without_a_usable_one(tmp_path: Path) -> None:
    prompts = ["a cat", None, " a cat", "a dog", "x" * 100_001]
    pq.write_table(pa.table({"n": range(5), "prompt": prompts, "image": [b"x"] * 5}), tmp_path / "a.parquet")
    file = read_prompt_file(tmp_path / "a.parquet")
    assert [(row.row, row.prompt and row.prompt[:5]) for row in file.rows] == [
        (0, "a cat"),
        (1, None),
        (3, "a dog"),
        (4, None),
    ]
    assert [str(row.reason).partition(":")[0] for row in file.rows] == ["None", "no prompt", "None", "text too long"]
    assert file.columns.to_pydict() == {"n": [0, 1, 3, 4]}
    assert len(read_prompt_file(tmp_path / "a.parquet", limit=2).rows) == 2


def test_columns_of_lines_that_lack_some(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "n": 1}, {"prompt": "b", "tags": ["x"]}, {"prompt": 3}, {"prompt": "c", "n": 2}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    file = read_prompt_file(tmp_path / "a.jsonl")
    assert file.rows[2] == PromptRow(2, None, "not text: 3")
    assert file.columns.to_pydict() == {"n": [1, None, None, 2], "tags": [None, ["x"], None, None]}
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", "n": 1}\n{"prompt": "b", "n": "x"}')
    with pytest.raises(UserError, match="--prompts .*b.jsonl: the values of 'n'"):
        read_prompt_file(tmp_path / "b.jsonl")


def test_lines_of_text_without_blank_ones(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\na\n\n b \n")
    assert read_prompt_file(tmp_path / "a.txt").rows == [PromptRow(1, "a"), PromptRow(3, "b")]
