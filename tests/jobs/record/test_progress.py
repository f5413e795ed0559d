from __future__ import annotations

import time

from smpo_pipeline.jobs.faults.crashes import WorkLog
from smpo_pipeline.jobs.record import progress
from smpo_pipeline.jobs.record.progress import Pace, Reporter, job_progress, shown_under_way
from smpo_pipeline.jobs.record.run_record import UnitRecord


def record(pairs, seconds=None):
    return UnitRecord(unit=0, pairs_in=pairs, pairs=pairs, rejects=[], entry=None, seconds=seconds)


def test_pace_in_words():
    now = [100.0]
    pace = Pace(lambda: now[0])
    pace.add(record(30))
    now[0] = 110.0
    assert pace.words(0) == "3 pairs/s"
    pace.add(record(10, (6, 8)))
    pace.add(record(10, (3, 4)))
    assert pace.words(2) == "5 pairs/s, model 75%, 2 rejected"


def test_reports_are_a_second_apart():
    now, counts = [0.0], WorkLog()
    reporter = Reporter(counts, lambda: now[0])
    seen = []
    for now[0] in (0.5, 1.0, 1.5, 2.5):
        reporter.report(0, None, now[0])
        seen.append(counts.under_way())
    assert seen == [0, 1.0, 1.0, 2.5]


def test_what_is_under_way_is_shown_between_two_commits(monkeypatch):
    monkeypatch.setattr(progress, "_ASK_SECONDS", 0.01)
    counts, bar = WorkLog(), job_progress()
    task = bar.add_task("invert", total=256, completed=128, note="", under_way="")
    with shown_under_way(bar, task, counts.under_way):
        counts.report(1, None, 37.5)
        deadline = time.monotonic() + 10
        while "37" not in bar.tasks[0].fields["under_way"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert bar.tasks[0].completed == 128
    assert bar.tasks[0].fields["under_way"] == ""


def test_progress_that_cannot_be_asked_for_ends_no_job(monkeypatch):
    monkeypatch.setattr(progress, "_ASK_SECONDS", 0.001)
    bar = job_progress()
    task = bar.add_task("invert", total=1, note="", under_way="")
    asked = []

    def ask() -> float:
        asked.append(1)
        raise ConnectionError

    with shown_under_way(bar, task, ask):
        time.sleep(0.1)
    assert len(asked) == 1
