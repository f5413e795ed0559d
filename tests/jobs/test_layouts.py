"""Two data sets of other layouts in one run of each job: scores and shards agree about positions, labels and votes."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smpo_schemas.pairs import image_id
from smpo_schemas.rejects import count_reasons, read_rejects
from smpo_schemas.scoring.scores import read_scores, read_scores_info
from smpo_schemas.shards.reader import ShardDirectory
from tests.pictures import encode, picture

pytestmark = pytest.mark.slow

PAIRS = 8
FLAGS = ("--min-confidence", "0.95")


def write_hpdv3(folder: Path) -> dict[str, tuple[str, str]]:
    """Images of other sizes, not square; the last two pairs are not sure, or lack an image.

    Returns:
        The ids of the preferred and of the other image, by prompt.
    """
    ids, rows = {}, []
    for number in range(PAIRS + 2):
        names = [f"images/{number}-{side}.jpg" for side in ("good", "bad")]
        files = [encode(picture(48 + 8 * side, 40, seed=2 * number + side)) for side in range(2)]
        for name, data in zip(names, files, strict=True):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        row = dict(zip(("path1", "path2"), names, strict=True)) | {"model1": "flux", "model2": "kolors"}
        rows.append(row | {"prompt": f"größer {number}", "confidence": 0.99, "choice_dist": [6, 2]})
        ids[f"größer {number}"] = (image_id(files[0]), image_id(files[1]))
    rows[-2]["confidence"] = 0.5
    (folder / rows[-1]["path2"]).unlink()
    (folder / "train.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(rows).encode())
    return dict(list(ids.items())[:PAIRS])


def write_rapidata(path: Path) -> dict[str, tuple[str, str]]:
    ids, rows = {}, []
    for number in range(PAIRS):
        files = [encode(picture(40, 56 + side, seed=100 + 2 * number + side)) for side in range(2)]
        images = {f"image{side + 1}": {"bytes": data, "path": None} for side, data in enumerate(files)}
        rows.append(
            {"prompt": f"a dog {number}", **images, "model1": "a", "model2": "b", "votes_image1": 9, "votes_image2": 3}
        )
        ids[f"a dog {number}"] = (image_id(files[0]), image_id(files[1]))
    pq.write_table(pa.Table.from_pylist(rows), path)
    return ids


def test_scores_and_shards_agree(inputs, tmp_path, on_ray) -> None:
    expected = write_hpdv3(tmp_path / "hpd") | write_rapidata(tmp_path / "train_0001.parquet")
    common = ("--pairs", tmp_path / "hpd", tmp_path / "train_*.parquet", *FLAGS, "--device", "cpu")
    scores, shards = tmp_path / "scores", tmp_path / "shards"
    reward = f"pickscore={inputs / 'pickscore'}"
    done = on_ray("smpo-pipeline", "score", *common, "--reward", reward, "--out", scores)
    assert done.returncode == 0, done.stderr
    assert " ".join(FLAGS) in done.stdout  # the next command chooses the same
    table = {row["prompt"]: row for row in read_scores(scores, read_scores_info(scores)).to_pylist()}
    assert table.keys() == expected.keys()
    assert count_reasons(read_rejects(scores / "rejected.parquet")) == {"low confidence": 1, "image not readable": 1}
    assert {row["label"] for row in table.values()} == {0.25, 0.75}
    for prompt, row in table.items():
        images, of_hpd = (row["image_0_id"], row["image_1_id"]), prompt.startswith("gr")
        assert images == (expected[prompt] if row["label"] == 0.75 else expected[prompt][::-1])
        assert (row["votes"], row["confidence"] is None) == ((8, False) if of_hpd else (12, True))
        models = ("flux", "kolors") if of_hpd else ("a", "b")
        assert (row["model_0"], row["model_1"]) == (models if row["label"] == 0.75 else models[::-1])

    made = ("--scores", scores, "--model", inputs / "model", "--out", shards, "--steps", 2, "--pairs-per-shard", 5)
    done = on_ray("smpo-pipeline", "invert", *common, *made, "--concurrency", 1)
    assert done.returncode == 0, done.stderr
    samples = [sample.meta for sample in ShardDirectory(shards).samples()]
    assert {sample.prompt for sample in samples} == expected.keys()
    for sample in samples:
        row = table[sample.prompt]
        assert (sample.pair_id, sample.label, sample.votes) == (row["pair_id"], row["label"], row["votes"])
        assert sample.scores["pickscore"] == pytest.approx([row["pickscore_0"], row["pickscore_1"]])
