"""From committed units to the table, without Ray; a kill at any moment leaves a valid table."""

from __future__ import annotations

import errno
import itertools
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tenacity

from smpo_common import retry
from smpo_common.errors import UserError
from smpo_pipeline.jobs.cells import cell_values
from smpo_pipeline.jobs.record.run_record import Run
from smpo_pipeline.jobs.score import table as score_table
from smpo_pipeline.jobs.score.chunks import chunk_images, cut_chunks, with_scores, without_images
from smpo_pipeline.jobs.score.collector import UnitCollector, require_current_units, unit_path
from smpo_pipeline.jobs.score.table import RewardRecord, write_table
from smpo_pipeline.weighing.table import write_column
from smpo_schemas.label_file import PairVotes
from smpo_schemas.pairs import Pair, PairRejectedError
from smpo_schemas.rejects import read_rejects
from smpo_schemas.scoring.scores import read_scores, read_scores_info
from tests.pictures import encode, picture

MODELS = {name: RewardRecord(f"hub/{name}", f"weights of {name}", "cosine", "fp32") for name in "ab"}
UNITS = 5


def unit_rows(unit: int, seed: int = 0):
    """Three good pairs, a broken image and a rejected row."""
    for row in range(5):
        source = f"file:{unit * 5 + row}"
        if row == 1:
            yield source, PairRejectedError("no image: x", "missing")
            continue
        images = [encode(picture(8 + row, 9, seed=seed + row * 2 + index), "PNG") for index in range(2)]
        if row == 3:
            images[1] = b"nonsense"
        yield source, Pair(f"{unit}-{row}", f"prompt {row}", *images, label=1.0, annotator="me")


def fake_scores(chunk, name: str) -> np.ndarray:
    """A function of the image and the reward's name; NaN for reward b on one pair of unit 2."""
    values = np.array([np.asarray(image).mean() + ord(name) for image, _ in chunk_images(chunk)])
    if name == "b" and chunk["unit"][0].as_py() == 2:
        values[0] = np.nan
    return values


def commit(out, names: str, seed: int = 0) -> Run:
    step = Run(out / ".scoring", "scores.json", {"rewards": list(names)})
    step.open(overwrite=False, patterns=())
    collect = UnitCollector(step, list(names), 1.0)
    for unit in range(UNITS):
        chunks = list(cut_chunks(unit, unit_rows(unit, seed)))
        scored = [without_images(with_scores(chunk, {n: fake_scores(chunk, n) for n in names})) for chunk in chunks]
        records = [record for chunk in reversed(scored) for record in collect(chunk)]
        assert [(record.unit, record.pairs_in) for record in records] == [(unit, 5)]
    return step


def models(names: str):
    return {name: MODELS[name] for name in names}


@pytest.fixture(autouse=True)
def _several_parts(monkeypatch):
    monkeypatch.setattr(score_table, "_UNITS_PER_PART", 2)


def test_transient_storage_errors_of_the_driver_change_nothing(tmp_path, monkeypatch):
    expected = write_table(tmp_path / "whole", commit(tmp_path / "whole", "a"), UNITS, models("a"), None)
    monkeypatch.setattr(retry.TRANSIENT_RETRY, "wait", tenacity.wait_none())
    calls, failing = itertools.count(), {3, 9, 12, 30, 36}
    fsync = os.fsync

    def fail(descriptor):
        if (call := next(calls)) in failing:
            failing.remove(call)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    step = commit(tmp_path / "failed", "a")
    assert failing == {30, 36}
    assert write_table(tmp_path / "failed", step, UNITS, models("a"), None) == expected
    assert not failing
    for path in (tmp_path / "whole").glob("*"):
        assert path.is_dir() or path.read_bytes() == (tmp_path / "failed" / path.name).read_bytes()


def test_adding_a_reward_keeps_columns_that_others_added(tmp_path):
    base = write_table(tmp_path, commit(tmp_path, "a"), UNITS, models("a"), None)
    ids = read_scores(tmp_path, base)["pair_id"].to_pylist()
    weights = np.array([np.nan, *range(1, len(ids))])
    write_column(tmp_path, base, "weight", weights)
    Run(tmp_path / ".scoring", "scores.json", {}).remove()
    info = write_table(tmp_path, commit(tmp_path, "b"), UNITS, models("b"), read_scores_info(tmp_path))
    table = read_scores(tmp_path, info)
    kept = dict(zip(ids, [None, *weights[1:].tolist()], strict=True))
    assert [kept[pair] for pair in table["pair_id"].to_pylist()] == table["weight"].to_pylist()
    assert (table.num_rows, table["weight"].null_count, str(table["weight"].type)) == (14, 1, "float")


def test_adding_a_reward_gives_the_bytes_of_scoring_both_together(tmp_path):
    together, one = tmp_path / "together", tmp_path / "one"
    expected = write_table(together, commit(together, "ab"), UNITS, models("ab"), None)
    base = write_table(one, commit(one, "a"), UNITS, models("a"), None)
    assert (base.scored, base.rejected) == (15, 10)
    step = Run(one / ".scoring", "scores.json", {})
    step.remove()
    info = write_table(one, commit(one, "b"), UNITS, models("b"), base)
    # The pair without a score is removed from the whole table, as if both rewards were scored together.
    assert (info.scored, info.rejected) == (14, 11)
    assert info == expected == read_scores_info(one)
    for part in info.parts:
        assert (one / part.name).read_bytes() == (together / part.name).read_bytes()
    assert read_rejects(one / "rejected.parquet") == read_rejects(together / "rejected.parquet")
    assert sorted(path.name for path in one.glob("scores-*")) == [part.name for part in info.parts]
    reasons = {reject.source: (reject.pair_id, reject.reason) for reject in read_rejects(one / "rejected.parquet")}
    assert reasons["file:10"] == ("2-0", "not finite: b gave no number for an image of this pair")
    assert reasons["file:1"] == ("missing", "no image: x")
    table = read_scores(one, info).to_pylist()
    picked = table[2]
    assert (picked["pair_id"], picked["annotator"], picked["label"]) == ("0-4", "me", 1.0)
    for index in range(2):
        mean = np.asarray(picture(12, 9, seed=8 + index)).mean()
        assert picked[f"a_{index}"] == pytest.approx(mean + ord("a"), rel=1e-6)
        assert picked[f"b_{index}"] == pytest.approx(mean + ord("b"), rel=1e-6)


def test_votes_replace_the_pairs_labels(tmp_path):
    votes = {"0-0": PairVotes(0.25, 4, None)}
    base = write_table(tmp_path, commit(tmp_path, "a"), UNITS, models("a"), None, labels=votes)
    assert base.rewards["a"].num_labelled == 15
    Run(tmp_path / ".scoring", "scores.json", {}).remove()
    info = write_table(tmp_path, commit(tmp_path, "b"), UNITS, models("b"), base, labels=votes)
    rows = {
        row["pair_id"]: (row["label"], row["votes"], row["annotator"])
        for row in read_scores(tmp_path, info).to_pylist()
    }
    assert rows["0-0"] == (0.25, 4, None)
    assert rows["0-2"] == (1.0, None, "me")


@pytest.mark.parametrize("votes", [{}, {"other": PairVotes(1, 1, None)}])
def test_votes_on_none_of_the_pairs_are_refused(tmp_path, votes):
    with pytest.raises(UserError, match=f"--labels: none of its {len(votes)} pairs is in --pairs"):
        write_table(tmp_path, commit(tmp_path, "a"), UNITS, models("a"), None, labels=votes)
    assert not (tmp_path / "scores.json").exists()


def test_a_kill_while_the_table_is_written_leaves_the_old_table_intact(tmp_path, monkeypatch):
    base = write_table(tmp_path, commit(tmp_path, "a"), UNITS, models("a"), None)
    before = read_scores(tmp_path, base)
    Run(tmp_path / ".scoring", "scores.json", {}).remove()
    step = commit(tmp_path, "b")
    for moment in ("write_rejects", "_describe", "write_scores_info", "remove_leftovers"):
        with monkeypatch.context() as patch:
            patch.setattr(score_table, moment, _killed)
            with pytest.raises(KeyboardInterrupt):
                write_table(tmp_path, step, UNITS, models("b"), base)
        written = read_scores_info(tmp_path)
        if moment == "remove_leftovers":
            assert written.rewards.keys() == {"a", "b"}
            break
        assert written == base
        assert read_scores(tmp_path, written).equals(before)
    score_table.remove_leftovers(tmp_path, written)
    assert sorted(path.name for path in tmp_path.glob("scores-*")) == [part.name for part in written.parts]


def _killed(*_arguments):
    raise KeyboardInterrupt


def test_other_images_with_the_same_ids_are_refused(tmp_path):
    base = write_table(tmp_path, commit(tmp_path, "a"), UNITS, models("a"), None)
    Run(tmp_path / ".scoring", "scores.json", {}).remove()
    step = commit(tmp_path, "b", seed=100)
    with pytest.raises(UserError, match=rf"--pairs: .*file:0 .*{tmp_path}.*--overwrite"):
        write_table(tmp_path, step, UNITS, models("b"), base)
    assert read_scores_info(tmp_path) == base


def test_chunks_are_cut_by_bytes_and_keep_every_row(monkeypatch):
    whole = list(cut_chunks(3, unit_rows(3)))
    assert len(whole) == 1
    monkeypatch.setattr("smpo_pipeline.jobs.score.chunks.CHUNK_BYTES", 2 * 8 * 9 * 3)
    small = list(cut_chunks(3, unit_rows(3)))
    assert [len(list(chunk_images(chunk))) for chunk in small] == [2, 2, 2]
    assert [chunk["last"][0].as_py() for chunk in small] == [False, False, True]
    pixels = [[np.asarray(image) for image, _ in chunk_images(chunk)] for chunk in (*small, *whole)]
    for mine, theirs in zip(itertools.chain(*pixels[:3]), pixels[3], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert [source for chunk in small for source in chunk["source"][0].as_py()] == [
        f"file:{15 + row}" for row in range(5)
    ]
    assert pixels[0][0].tolist() == np.asarray(picture(8, 9, seed=0)).tolist()


def test_pixels_are_not_copied_on_their_way_to_a_reward():
    (chunk,) = cut_chunks(3, unit_rows(3))
    address = chunk["pixels"].chunk(0).values.buffers()[2].address
    assert cell_values(chunk, "pixels").buffers()[2].address == address
    # Also if the chunk is one row of a larger table.
    (other,) = cut_chunks(4, unit_rows(4, seed=50))
    both = pa.concat_tables([chunk, other])
    assert cell_values(both.slice(0, 1), "pixels").buffers()[2].address == address
    for mine, whole in ((both.slice(0, 1), chunk), (both.combine_chunks().slice(1, 1), other)):
        for (image, prompt), (expected, words) in zip(chunk_images(mine), chunk_images(whole), strict=True):
            assert prompt == words
            np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


def commit_pairs(out, units, reward="a", max_reject_rate=1.0):
    """Commit units of (pair_id, number of the pair that has it)."""
    step = Run(out / ".scoring", "scores.json", {})
    step.open(overwrite=False, patterns=())
    collect = UnitCollector(step, [reward], max_reject_rate)
    for unit, named in enumerate(units):
        pairs = [
            Pair(name, "prompt", *(encode(picture(9, 9, seed=2 * what + k), "PNG") for k in range(2)), None, None)
            for name, what in named
        ]
        rows = ((f"file:{unit}.{row}", pair) for row, pair in enumerate(pairs))
        (chunk,) = cut_chunks(unit, rows)
        list(collect(without_images(with_scores(chunk, {reward: fake_scores(chunk, reward)}))))
    return step


def test_later_pairs_with_the_id_of_another_pair_are_rejected(tmp_path):
    """A second label of the same pair is not rejected."""
    units = [[("x", 0), ("y", 1), ("x", 0)], [("z", 2), ("z", 3)], [("z", 2), ("y", 0), ("x", 0)], [("y", 1), ("w", 4)]]
    info = write_table(tmp_path, commit_pairs(tmp_path, units), len(units), models("a"), None)
    rejects = read_rejects(tmp_path / "rejected.parquet")
    assert [(reject.source, reject.pair_id) for reject in rejects] == [("file:1.1", "z"), ("file:2.1", "y")]
    assert all("pair_id" in reject.reason for reject in rejects)
    assert read_scores(tmp_path, info)["pair_id"].to_pylist() == ["x", "y", "x", "z", "z", "x", "y", "w"]
    # They stay rejected when a reward is added.
    Run(tmp_path / ".scoring", "scores.json", {}).remove()
    write_table(tmp_path, commit_pairs(tmp_path, units, "b"), len(units), models("b"), info)
    assert [reject for reject in read_rejects(tmp_path / "rejected.parquet") if "pair_id" in reject.reason] == rejects


def test_a_column_that_does_not_identify_pairs_stops_the_run_early(tmp_path):
    units = [[(f"prompt {row % 3}", unit * 8 + row) for row in range(8)] for unit in range(40)]
    with pytest.raises(UserError, match=r"--max-reject-rate 0\.2 .*--pair-id-column") as caught:
        commit_pairs(tmp_path, units, max_reject_rate=0.2)
    assert "prompt " in str(caught.value)
    assert 0 < len(list((tmp_path / ".scoring" / ".units").glob("*.json"))) < 10
    commit_pairs(tmp_path / "as often as that", units)


def test_a_unit_with_only_rejects_is_committed(tmp_path):
    step = Run(tmp_path / ".scoring", "scores.json", {})
    step.open(overwrite=False, patterns=())
    rows = [("file:0", PairRejectedError("no image: x"))]
    (chunk,) = cut_chunks(0, rows)
    (record,) = UnitCollector(step, ["a"], 1.0)(without_images(with_scores(chunk, {"a": np.empty(0)})))
    assert (record.pairs_in, record.pairs, len(record.rejects)) == (1, 0, 1)
    with pytest.raises(UserError, match=r"no pair could be scored, 1 were rejected .*the first: file:0: no image: x"):
        write_table(tmp_path, step, 1, models("a"), None)
    assert pq.read_table(tmp_path / "rejected.parquet").num_rows == 1


def test_units_of_an_earlier_version_are_refused_before_more_are_scored(tmp_path):
    step = commit(tmp_path, "a")
    require_current_units(step)
    path = unit_path(step, 0)
    pq.write_table(pq.read_table(path).drop(["votes"]), path)
    for work in (lambda: require_current_units(step), lambda: write_table(tmp_path, step, UNITS, models("a"), None)):
        with pytest.raises(UserError, match="earlier version, which kept no votes; .* --overwrite"):
            work()
