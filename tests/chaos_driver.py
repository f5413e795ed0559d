"""``smpo-pipeline`` whose workers write into ``$CHAOS_LOG`` when they begin a unit, and when it is committed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from smpo_pipeline.cli import main
from smpo_pipeline.jobs.invert import job as invert
from smpo_pipeline.jobs.invert.actor import InvertActor
from smpo_pipeline.jobs.score import job as score
from smpo_pipeline.jobs.score.actor import RewardActor
from smpo_pipeline.jobs.score.collector import UnitCollector


def log(*words: object) -> None:
    """A line, at once: lines of several processes do not mix."""
    with Path(os.environ["CHAOS_LOG"]).open("a") as file:
        file.write(" ".join(map(str, words)) + "\n")


class LoggedInvertActor(InvertActor):
    def _make(self, unit, row):
        log("begin", "invert", unit)
        record = super()._make(unit, row)
        log("commit", "invert", unit)
        return record


class LoggedRewardActor(RewardActor):
    def __call__(self, chunk):
        log("begin", "score", chunk["unit"][0].as_py())
        return super().__call__(chunk)


class LoggedCollector(UnitCollector):
    def _commit(self, unit, chunks):
        record = super()._commit(unit, chunks)
        log("commit", "score", unit)
        return record


def run() -> None:
    """The command line, with these in the place of their bases."""
    invert.InvertActor = LoggedInvertActor
    score.RewardActor = LoggedRewardActor
    score.UnitCollector = LoggedCollector
    sys.argv[0] = "smpo-pipeline"
    main()
