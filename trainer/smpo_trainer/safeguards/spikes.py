"""Spikes: steps after which the model's error is suddenly far above what it was (``--on-spike``).

A run that diverges turns images into noise, and does not recover. What tells it apart from a healthy run is the ratio
of the model's error to the reference's: in a healthy run it may rise over the whole run, but not within a few steps.
Loss and gradient norm do not tell them apart: they are scaled by beta, and jump in healthy runs too.

The detector is a function of the metrics, which are the same in all processes.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smpo_common.files import write_bytes
from smpo_trainer.monitoring.metrics import Record

SPIKES_FILE = "spikes.jsonl"

USUAL_STEPS = 20
"""The usual ratio is the median of this many steps before."""

LAST_STEPS = 3
"""Steps whose smallest ratio must be above the limit, so that a few odd states are not taken for a spike."""

MAX_ROLLBACKS = 10
"""A run that spikes more often ends."""

LR_FACTOR = 0.5
"""Factor of the learning rate after a rollback: with the same one, the same steps would spike again."""


@dataclass(frozen=True)
class Spike:
    """One spike.

    Attributes:
        step: the step at which it was noticed, from 1.
        error_ratio: the model's mean error over the reference's.
        usual: this ratio before.
        rolled_back_to: number of finished steps of the checkpoint that the run continued from; None if it did not go
            back.
        lr_factor: factor of the configured learning rate from then on, earlier rollbacks included.
    """

    step: int
    error_ratio: float
    usual: float
    rolled_back_to: int | None = None
    lr_factor: float = 1.0

    def describe(self) -> str:
        """Describe it in one line."""
        return (
            f"spike at step {self.step}: within a few steps the model's error rose from {self.usual:.3g} to "
            f"{self.error_ratio:.3g} times the reference's"
        )


class SpikeDetector:
    """Notices spikes, and keeps them for ``spikes.jsonl``.

    Attributes:
        spikes: spikes of the run so far.
    """

    def __init__(self, out: Path, limit: float) -> None:
        """Start without steps.

        Args:
            out: the run's folder.
            limit: a ratio above this many times the usual one is a spike.
        """
        self._path, self._limit = out / SPIKES_FILE, limit
        self._ratios: list[float] = []
        self.spikes: list[Spike] = []

    def check(self, record: Record) -> Spike | None:
        """Check the metrics of a step; return a new spike, or None.

        Metrics that are not finite, as those of a skipped step, are ignored.
        """
        ratio = error_ratio(record)
        if ratio is None:
            return None
        self._ratios = [*self._ratios, ratio][-(USUAL_STEPS + LAST_STEPS) :]
        before, last = self._ratios[:-LAST_STEPS], self._ratios[-LAST_STEPS:]
        if not before or min(last) <= self._limit * statistics.median(before):
            return None
        self._ratios = []  # what follows is compared with itself, so that a spike is noticed once
        return Spike(int(record["step"] or 0), ratio, statistics.median(before))

    def add(self, spike: Spike) -> None:
        """Keep a spike."""
        self.spikes.append(spike)

    @property
    def rollbacks(self) -> int:
        """How often the run went back."""
        return sum(spike.rolled_back_to is not None for spike in self.spikes)

    def write(self) -> None:
        """Write ``spikes.jsonl``; for the main process only."""
        if self.spikes or self._path.is_file():
            write_bytes(self._path, b"".join(json.dumps(asdict(spike)).encode() + b"\n" for spike in self.spikes))

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"ratios": list(self._ratios), "spikes": [asdict(spike) for spike in self.spikes]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self._ratios = list(state["ratios"])
        self.spikes = [Spike(**spike) for spike in state["spikes"]]


def error_ratio(record: Record) -> float | None:
    """Return the model's error over the reference's, of both images; None if it is not known or not finite."""
    errors = [record.get(f"error/image_{image}") for image in (0, 1)]
    differences = [record.get(f"error_minus_reference/image_{image}") for image in (0, 1)]
    if any(value is None for value in (*errors, *differences)):
        return None
    error, difference = sum(errors), sum(differences)  # type: ignore[arg-type]  # none is None
    ratio = error / (error - difference) if error > difference else math.inf
    return ratio if math.isfinite(ratio) else None
