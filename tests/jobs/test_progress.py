from __future__ import annotations

from smpo_pipeline.jobs.progress import Pace
from smpo_pipeline.jobs.run import UnitRecord


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
