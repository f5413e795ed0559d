"""Chosen and rejected images through both jobs: scores and shards agree about positions and labels."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smpo_schemas.pairs import image_id
from smpo_schemas.scores import read_scores, read_scores_info
from smpo_schemas.shards.reader import ShardDirectory
from tests.pictures import encode, picture

pytestmark = pytest.mark.slow

COLUMNS = ("--chosen-column", "chosen", "--rejected-column", "rejected")
PAIRS = 12


def write_pairs(path: Path) -> dict[str, tuple[str, str]]:
    """Pairs; of each prompt the ids of the chosen and the rejected image, in this order."""
    ids, rows = {}, []
    for number in range(PAIRS):
        chosen, rejected = (encode(picture(48, 40, seed=2 * number + index)) for index in range(2))
        images = {"chosen": {"bytes": chosen, "path": None}, "rejected": {"bytes": rejected, "path": None}}
        rows.append({"prompt": f"a cat {number}", **images})
        ids[f"a cat {number}"] = (image_id(chosen), image_id(rejected))
    pq.write_table(pa.Table.from_pylist(rows), path)
    return ids


def test_scores_and_shards_agree(inputs, tmp_path, on_ray) -> None:
    expected = write_pairs(tmp_path / "pairs.parquet")
    common = ("--pairs", tmp_path / "pairs.parquet", *COLUMNS, "--device", "cpu")
    scores, shards = tmp_path / "scores", tmp_path / "shards"
    reward = f"pickscore={inputs / 'pickscore'}"
    done = on_ray("smpo-pipeline", "score", *common, "--reward", reward, "--out", scores)
    assert done.returncode == 0, done.stderr
    assert f"{COLUMNS[0]} {COLUMNS[1]}" in done.stdout  # the next command chooses them, too
    table = {row["prompt"]: row for row in read_scores(scores, read_scores_info(scores)).to_pylist()}
    assert table.keys() == expected.keys()
    assert {row["label"] for row in table.values()} == {0.0, 1.0}
    for prompt, row in table.items():
        images = (row["image_0_id"], row["image_1_id"])
        assert images == (expected[prompt] if row["label"] else expected[prompt][::-1])

    made = ("--scores", scores, "--model", inputs / "model", "--out", shards, "--steps", 2, "--pairs-per-shard", 5)
    done = on_ray("smpo-pipeline", "invert", *common, *made, "--concurrency", 1)
    assert done.returncode == 0, done.stderr
    samples = [sample.meta for sample in ShardDirectory(shards).samples()]
    assert {sample.prompt for sample in samples} == expected.keys()
    for sample in samples:
        row = table[sample.prompt]
        assert (sample.pair_id, sample.label) == (row["pair_id"], row["label"])
        assert sample.scores["pickscore"] == pytest.approx([row["pickscore_0"], row["pickscore_1"]])
