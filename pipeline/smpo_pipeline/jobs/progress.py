"""What a job shows while it runs: how far it is, how fast, how much of it is the model at work, what was rejected."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from smpo_pipeline.jobs.run import UnitRecord

_SPEED_SECONDS = 3600
"""The remaining time goes by the last hour; units may be minutes apart."""


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


def job_progress() -> Progress:
    """A progress bar whose tasks have a field ``note``."""
    return Progress(
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("pairs"),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        TextColumn("[yellow]{task.fields[note]}"),
        speed_estimate_period=_SPEED_SECONDS,
    )
