"""Looking up the scores of a unit's pairs in the table, without Ray."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smpo_common.errors import UserError
from smpo_pipeline.jobs.invert.actor import InvertActor
from smpo_pipeline.jobs.invert.job import _score_table
from smpo_pipeline.jobs.invert.prepare import prepare_unit, unit_row
from smpo_schemas.pairs import RowRange, layouts_of, list_pair_files
from smpo_schemas.scoring.scores import SCORES_VERSION, RewardStatistics, ScoresInfo, write_part, write_scores_info
from tests.pictures import encode, picture

STATISTICS = RewardStatistics(
    model="m", fingerprint="f", unit="u", min=0, max=1, mean=0.5, std=0.1, agreement=None, num_labelled=0
)


def write_table(folder, *parts, images=None, dtype="fp32"):
    written = [
        write_part(
            folder / f"{number}.parquet",
            [
                {"pair_id": name, "prompt": name, "r_0": s, "r_1": 0.5, **(images or {}).get(name, {})}
                for name, s in rows
            ],
            ["r"],
        )
        for number, rows in enumerate(parts)
    ]
    rewards = {"r": STATISTICS.model_copy(update={"dtype": dtype})}
    info = ScoresInfo(schema_version=SCORES_VERSION, rewards=rewards, parts=written, scored=0, rejected=0)
    write_scores_info(folder, info)
    return info


def test_score_lookup_returns_the_first_row_of_each_known_id(tmp_path):
    first, second = [(f"p{row}", 0.1) for row in range(50)], [(f"p{row}", 0.10005) for row in range(40, 90)]
    table = _score_table(tmp_path, write_table(tmp_path, first, second))
    # take() of a string column fails beyond 2 GiB of text, which no test can hold.
    assert table["pair_id"].type == pa.large_string()
    actor = InvertActor.__new__(InvertActor)
    actor._scores = table
    found = actor._find_scores(pa.array(["p45", "p3", "none", "p80", "p3"]))
    scores = {name: row["r_0"] for name, row in found.items()}
    assert scores == pytest.approx({"p45": 0.1, "p3": 0.1, "p80": 0.10005}, abs=1e-6)


@pytest.mark.parametrize(
    ("dtype", "apart", "refused"),
    # Tolerances: 1e-4 of the range, which is 1; in half precision a fifth of the standard deviation, which is 0.1.
    [("fp32", 5e-5, False), ("fp32", 5e-4, True), ("bf16", 0.015, False), ("fp16", 0.025, True)],
)
def test_one_id_with_scores_that_differ_by_more_than_rounding_is_refused(tmp_path, dtype, apart, refused):
    info = write_table(tmp_path, [("a", 0.1), ("b", 0.2)], [("a", 0.1), ("b", 0.2 + apart)], dtype=dtype)
    if not refused:
        assert len(_score_table(tmp_path, info)) == 4
        return
    with pytest.raises(UserError, match="pair_id 'b'.*--pair-id-column"):
        _score_table(tmp_path, info)


def test_exchanged_or_replaced_images_get_no_scores(tmp_path):
    files = [encode(picture(32, 32, seed=seed)) for seed in range(3)]
    shown = {"same": (0, 1), "exchanged": (1, 0), "replaced": (0, 2), "unnamed": (1, 0)}
    rows = [
        {"pair_id": name, "prompt": name, "image_0": files[first], "image_1": files[second]}
        for name, (first, second) in shown.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    ranges = [RowRange(tmp_path / "pairs.parquet", 0, len(rows))]
    layouts = layouts_of(list_pair_files([tmp_path / "pairs.parquet"]))
    table, _ = prepare_unit(ranges, layouts, 0, [(32, 32)])
    scored = {f"image_{index}_id": hashlib.sha256(files[index]).hexdigest()[:32] for index in (0, 1)}
    images = {name: scored for name in shown if name != "unnamed"}
    actor = InvertActor.__new__(InvertActor)
    actor._scores = _score_table(tmp_path, write_table(tmp_path, [(name, 0.1) for name in shown], images=images))
    actor._options, actor._measure_every = SimpleNamespace(scores="scores"), 1
    rejects = []
    taken = [pair.pair_id for _, _, pair in actor._pairs(unit_row(0, table, []), rejects)]
    assert taken == ["same", "unnamed"]
    assert [(reject.pair_id, reject.kind) for reject in rejects] == [
        ("exchanged", "other images"),
        ("replaced", "other images"),
    ]
    # An older table without image ids.
    actor._scores = actor._scores.drop_columns(list(scored))
    assert len(list(actor._pairs(unit_row(0, table, []), rejects))) == len(shown)
