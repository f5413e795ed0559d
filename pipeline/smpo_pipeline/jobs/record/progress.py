"""The progress bar of a job: pairs done, pairs per second, the model's share of the actors' time, rejects."""

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

from smpo_pipeline.jobs.record.run_record import UnitRecord
from smpo_pipeline.jobs.record.work_log import WorkLog

_SPEED_SECONDS = 3600
"""Window of the speed that the remaining time is estimated from; units may be minutes apart."""

_POLL_SECONDS = 2.0
_REPORT_SECONDS = 1.0


class Reporter:
    """Reports a worker's progress to the work log, at most once a second: batches may be faster."""

    def __init__(self, work_log: WorkLog, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` is in seconds."""
        self._log, self._clock, self._next = work_log, clock, clock() + _REPORT_SECONDS

    def report(self, unit: int, part: Hashable, pairs: float) -> None:
        """See :meth:`WorkLog.report`."""
        if self._clock() >= self._next:
            self._next = self._clock() + _REPORT_SECONDS
            self._log.report(unit, part, pairs)


class Pace:
    """Speed of a job, or of a stage of it, since it was started or continued."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, noun: str = "pairs") -> None:
        """Start the clock; ``clock`` is in seconds, ``noun`` says what the input rows are."""
        self._noun, self._clock, self._started = noun, clock, clock()
        self._pairs, self._model_seconds, self._actor_seconds = 0, 0.0, 0.0

    def add(self, record: UnitRecord) -> None:
        """Count a committed unit."""
        model, actor = record.seconds or (0.0, 0.0)
        self._pairs += record.pairs_in
        self._model_seconds += model
        self._actor_seconds += actor

    def describe(self, rejected: int) -> str:
        """Describe input rows per second (start-up included), the model's share of the actors' time, and rejects."""
        parts = [f"{self._pairs / (self._clock() - self._started):.3g} {self._noun}/s"]
        if self._actor_seconds:
            parts.append(f"model {self._model_seconds / self._actor_seconds:.0%}")
        if rejected:
            parts.append(f"{rejected} rejected")
        return ", ".join(parts)


@contextmanager
def show_pairs_in_progress(progress: Progress, task: TaskID, poll: Callable[[], float]) -> Iterator[None]:
    """Show the pairs done in uncommitted units, every few seconds while the block runs.

    Args:
        progress: made by :func:`job_progress`.
        task: whose line to update.
        poll: returns the number of pairs; called in another thread.
    """
    stop = Event()

    def watch() -> None:
        # A failure here would also fail the job's own calls, which report it.
        with suppress(Exception):
            while not stop.wait(_POLL_SECONDS):
                pairs = int(poll())
                progress.update(task, in_progress=f"(+{pairs} in progress)" if pairs else "")

    thread = Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(_POLL_SECONDS)
        progress.update(task, in_progress="")


def job_progress(noun: str = "pairs") -> Progress:
    """Make a progress bar of ``noun`` whose tasks have the fields ``note`` and ``in_progress``."""
    return Progress(
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(noun + " {task.fields[in_progress]}"),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        TextColumn("[yellow]{task.fields[note]}"),
        speed_estimate_period=_SPEED_SECONDS,
    )
