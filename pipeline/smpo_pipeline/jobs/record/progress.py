"""What a job shows while it runs: how far it is, how fast, how much of it is the model at work, what was rejected."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from smpo_pipeline.jobs.faults.crashes import WorkLog
from smpo_pipeline.jobs.record.run_record import UnitRecord

_SPEED_SECONDS = 3600
"""The remaining time goes by the last hour; units may be minutes apart."""

_ASK_SECONDS = 2.0
_REPORT_SECONDS = 1.0


class Reporter:
    """Reports a worker's progress, at most once a second: batches may be faster."""

    def __init__(self, work_log: WorkLog, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` is in seconds."""
        self._log, self._clock, self._next = work_log, clock, clock() + _REPORT_SECONDS

    def report(self, unit: int, part: Hashable, pairs: float) -> None:
        """See :meth:`WorkLog.report`."""
        if self._clock() >= self._next:
            self._next = self._clock() + _REPORT_SECONDS
            self._log.report(unit, part, pairs)


class Pace:
    """Of the units that are made from now on."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` is in seconds."""
        self._clock, self._began = clock, clock()
        self._pairs, self._model_seconds, self._actor_seconds = 0, 0.0, 0.0

    def add(self, record: UnitRecord) -> None:
        """A unit is committed."""
        model, actor = record.seconds or (0.0, 0.0)
        self._pairs += record.pairs_in
        self._model_seconds += model
        self._actor_seconds += actor

    def words(self, rejected: int) -> str:
        """Pairs a second (starting up is part of it), the model's share of the actors' time, and rejects."""
        parts = [f"{self._pairs / (self._clock() - self._began):.3g} pairs/s"]
        if self._actor_seconds:
            parts.append(f"model {self._model_seconds / self._actor_seconds:.0%}")
        if rejected:
            parts.append(f"{rejected} rejected")
        return ", ".join(parts)


@contextmanager
def shown_under_way(progress: Progress, task: TaskID, ask: Callable[[], float]) -> Iterator[None]:
    """Show, every few seconds while the block runs, how many pairs are done of units that are not committed.

    Args:
        progress: made by :func:`job_progress`.
        task: whose line it is.
        ask: how many there are, from another thread.
    """
    over = Event()

    def watch() -> None:
        # Whatever fails here would fail the job's own calls too, which say so.
        with suppress(Exception):
            while not over.wait(_ASK_SECONDS):
                pairs = int(ask())
                progress.update(task, under_way=f"(and {pairs} of units under way)" if pairs else "")

    thread = Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(_ASK_SECONDS)
        progress.update(task, under_way="")


def job_progress() -> Progress:
    """A progress bar whose tasks have the fields ``note`` and ``under_way``."""
    return Progress(
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("pairs {task.fields[under_way]}"),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        TextColumn("[yellow]{task.fields[note]}"),
        speed_estimate_period=_SPEED_SECONDS,
    )
