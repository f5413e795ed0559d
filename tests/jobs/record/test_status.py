"""`smpo-pipeline status`: counts and rates of made-up runs, computed by hand."""

from __future__ import annotations

import os
import socket

import pytest

from smpo_common.files import write_json
from smpo_pipeline.commands.runs.status import duration
from smpo_pipeline.jobs.record import run_record as run_module
from smpo_pipeline.jobs.record import status
from smpo_pipeline.jobs.record.lock import locked
from smpo_pipeline.jobs.record.run_record import Run, UnitRecord
from smpo_pipeline.jobs.record.status import read_status
from smpo_schemas.rejects import Reject, write_rejects
from smpo_schemas.scoring.scores import SCORES_VERSION, RewardStatistics, ScoresInfo, write_scores_info
from tests.command import assert_one_line, run_here

BEGUN = 1_000_000.0


@pytest.fixture
def clock(monkeypatch):
    """Set the time that commits record."""
    return lambda now: monkeypatch.setattr(run_module.time, "time", lambda: now)


def identity(**more):
    return {"input": {"files": [["a", 700, 1, ""], ["b", 500, 1, ""]], "limit": 1000}, **more}


def commit(run, unit, rejected, reason="bad image: x", seconds=None):
    rejects = [Reject(pair_id=None, source="a:0", stage="invert", reason=reason)] * rejected
    record = UnitRecord(unit=unit, pairs_in=100, pairs=100 - rejected, rejects=rejects, entry=None, seconds=seconds)
    run.commit(record)


def test_an_unfinished_run_shows_its_progress_and_rate(tmp_path, clock, capfd):
    run = Run(tmp_path, "manifest.json", identity(job="invert", pairs_per_shard=100))
    run.open(overwrite=False, patterns=())
    os.utime(tmp_path / "run.json", (BEGUN, BEGUN))
    clock(BEGUN - 5000)  # of a session before this one
    commit(run, 0, 3, seconds=(1, 100))
    result = read_status(tmp_path)
    assert (result.units, result.units_done, result.pairs_in, result.pairs_done) == (10, 1, 1000, 100)
    assert (result.rate, result.remaining, result.last_commit) == (None, None, BEGUN - 5000)
    clock(BEGUN + 20)
    commit(run, 1, 0, seconds=(8, 10))
    clock(BEGUN + 50)
    commit(run, 2, 4, "no score: y", seconds=(22, 30))
    with locked(tmp_path):
        assert read_status(tmp_path).holder == f"process {os.getpid()} on {socket.gethostname()}"
    result = read_status(tmp_path)
    assert not result.finished
    assert result.holder is None
    assert (result.units_done, result.pairs_done, result.rejected) == (3, 300, 7)
    assert list(result.reasons.items()) == [("no score", 4), ("bad image", 3)]
    assert result.rate == 200 / 50
    assert result.remaining == 700 / 4
    assert result.model_share == 30 / 40
    printed = run_here(capfd, "smpo-pipeline", "status", tmp_path).stdout
    for words in (
        "not finished",
        "3 of 10",
        "300 of 1,000 (30.0%)",
        "7 (2.33%)",
        "4 no score",
        "4 pairs/s",
        "75% of",
        "3 min",
    ):
        assert words in printed


def test_a_run_that_ends_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    """Its records vanish after they are listed; then its run.json, as another run starts."""
    run = Run(tmp_path, "manifest.json", identity(job="invert", pairs_per_shard=100))
    run.open(overwrite=False, patterns=())
    for unit in range(3):
        commit(run, unit, 0)
    listing = run_module.list_files

    def vanish(directory, pattern):
        result = listing(directory, pattern)
        monkeypatch.setattr(run_module, "list_files", listing)
        result[0].unlink()
        return result

    monkeypatch.setattr(run_module, "list_files", vanish)
    assert read_status(tmp_path).units_done == 2
    run.record_path(1).unlink()
    begun = iter([False, True])

    def last_start(out):
        if next(begun):
            return BEGUN
        raise FileNotFoundError(out / "run.json")

    monkeypatch.setattr(status, "last_start", last_start)
    assert read_status(tmp_path).units_done == 1


def test_scores_with_a_written_table_are_finished_although_the_units_remain(tmp_path):
    numbers = dict.fromkeys(("min", "max", "mean", "std"), 0.5)
    reward = RewardStatistics(model="", fingerprint="", unit="", agreement=None, num_labelled=0, **numbers)
    info = ScoresInfo(schema_version=SCORES_VERSION, rewards={"there": reward}, parts=[], scored=3, rejected=0)
    write_scores_info(tmp_path, info)
    write_rejects(tmp_path / "rejected.parquet", [])
    write_json(tmp_path / "run.json", identity(job="score"))
    for name, finished in {"there": True, "another": False}.items():
        write_json(tmp_path / ".scoring" / "run.json", identity(job="score", rewards={name: ""}))
        result = read_status(tmp_path)
        assert (result.finished, result.rewards) == (finished, [name])


def test_a_folder_without_a_run_is_one_line(tmp_path, capfd):
    assert_one_line(run_here(capfd, "smpo-pipeline", "status", tmp_path), f"{tmp_path} holds no run.json")


def test_durations():
    assert [duration(seconds) for seconds in (12, 90, 3600, 11_100, 200_000)] == [
        "12 s",
        "2 min",
        "1 h",
        "3 h 5 min",
        "2 d 7 h",
    ]
