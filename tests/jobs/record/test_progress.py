from __future__ import annotations

import time

from smpo_pipeline.jobs.record import progress
from smpo_pipeline.jobs.record.progress import Pace, Reporter, job_progress, show_pairs_in_progress
from smpo_pipeline.jobs.record.run_record import UnitRecord
from smpo_pipeline.jobs.record.work_log import WorkLog


def record(pairs, seconds=None):
    return UnitRecord(unit=0, pairs_in=pairs, pairs=pairs, rejects=[], entry=None, seconds=seconds)


def test_the_pace_counts_pairs_model_time_and_rejects():
    now = [100.0]
    pace = Pace(lambda: now[0])
    pace.add(record(30))
    now[0] = 110.0
    assert pace.describe(0) == "3 pairs/s"
    pace.add(record(10, (6, 8)))
    pace.add(record(10, (3, 4)))
    assert pace.describe(2) == "5 pairs/s, model 75%, 2 rejected"


def test_reports_are_a_second_apart():
    now, counts = [0.0], WorkLog()
    reporter = Reporter(counts, lambda: now[0])
    seen = []
    for now[0] in (0.5, 1.0, 1.5, 2.5):
        reporter.report(0, None, now[0])
        seen.append(counts.pairs_in_progress())
    assert seen == [0, 1.0, 1.0, 2.5]


def test_pairs_in_progress_are_shown_between_two_commits(monkeypatch):
    monkeypatch.setattr(progress, "_POLL_SECONDS", 0.01)
    counts, bar = WorkLog(), job_progress()
    task = bar.add_task("invert", total=256, completed=128, note="", in_progress="")
    with show_pairs_in_progress(bar, task, counts.pairs_in_progress):
        counts.report(1, None, 37.5)
        deadline = time.monotonic() + 10
        while "37" not in bar.tasks[0].fields["in_progress"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert bar.tasks[0].completed == 128
    assert bar.tasks[0].fields["in_progress"] == ""


def test_a_failure_to_poll_progress_does_not_end_the_job(monkeypatch):
    monkeypatch.setattr(progress, "_POLL_SECONDS", 0.001)
    bar = job_progress()
    task = bar.add_task("invert", total=1, note="", in_progress="")
    polled = []

    def poll() -> float:
        polled.append(1)
        raise ConnectionError

    with show_pairs_in_progress(bar, task, poll):
        time.sleep(0.1)
    assert len(polled) == 1
