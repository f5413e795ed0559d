"""Warnings about common failures of preference training, from the metrics of a run.

They depend on the records in ``metrics.jsonl`` only, so a resumed run reads its earlier records and warns like an
uninterrupted one. Thresholds separate good from broken runs on the embedded world
(``benchmarks/experiments/health.py``).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from smpo_trainer.monitoring.bands import banded_name, bands
from smpo_trainer.monitoring.metrics import Record

MIN_STEPS = 20
"""Steps over which losses and margins are averaged."""

MIN_STATES = 1000
"""Minimum number of states over which accuracies and bands are averaged: with fewer, chance dominates."""

MIN_EVALUATIONS = 4
"""Evaluations of the held-out pairs over which their accuracy is averaged."""

NEAR_ZERO_LOSS = 0.1
"""The training loss is near 0 below this fraction of the loss at the first step."""

MIN_IMPROVEMENT = 0.03
"""The held-out accuracy stagnates if it has risen by less since the first evaluation."""

MIN_GAP = 0.1
"""Stagnation only matters if the training accuracy is higher by at least this."""

EXPLODED_MARGIN = 10.0
"""Mean absolute margin. At 10, P(preferred) differs from 1 by 1 in 20,000; good runs end near 1."""

CHANCE_ERRORS = 1.5
"""An accuracy less than this many standard errors above 1/2 is at chance."""

DOMINANT_SHARE = 2 / 3
"""A timestep band with this share of the margin of all bands dominates."""

SMALL_MARGIN = 0.01
"""Below this mean margin the shares of the bands are noise."""

SATURATED_SHARE = 0.75
"""Share of saturated states above which the sigmoid hides most of the data."""

STILL_STEPS, STILL_MARGIN = 100, 0.02
"""If the margins' root mean square is below this margin after this many steps, the model hardly changes."""

Rule = Callable[[Sequence[Record]], str | None]
"""Takes the last :data:`MIN_STEPS` records; returns a warning or None."""


class Health:
    """Checks the records of a run, in order.

    Attributes:
        warnings: all warnings so far; each rule warns once.
    """

    def __init__(
        self,
        *,
        warmup_steps: int,
        states_per_step: int,
        num_held_out: int,
        num_train_timesteps: int,
        uses_reference: bool,
    ) -> None:
        """Start without records.

        Args:
            warmup_steps: warm-up of the learning rate; only later records are checked.
            states_per_step: states per step over all processes.
            num_held_out: number of held-out states that are evaluated, or 0.
            num_train_timesteps: T, the length of the noise schedule.
            uses_reference: whether the objective's loss depends on the reference. If not, it does not train margins and
                accuracies against the reference, and they are not checked.
        """
        self._warmup_steps, self._num_held_out = warmup_steps, num_held_out
        self._bands = bands(num_train_timesteps)
        self._window = max(MIN_STEPS, math.ceil(MIN_STATES / states_per_step))
        self._num_states = self._window * states_per_step
        self._records: deque[Record] = deque(maxlen=self._window)
        self._accuracies: deque[float] = deque(maxlen=MIN_EVALUATIONS)
        self._first_accuracy: float | None = None
        self._first_loss: float | None = None
        self._num_judged = 0
        self._rules: list[Rule] = [self._memorises]
        if uses_reference:
            self._rules += [self._explodes, self._saturates, self._stands_still, self._guesses, self._one_band]
        self.warnings: list[str] = []

    def check(self, record: Record) -> list[str]:
        """Add the record of a step; return new warnings."""
        if self._first_loss is None:
            self._first_loss = record.get("loss")
        if int(record["step"] or 0) <= self._warmup_steps:
            return []
        self._records.append(record)
        self._num_judged += 1
        accuracy = record.get("val/rewards/accuracies")
        if accuracy is not None:
            self._first_accuracy = accuracy if self._first_accuracy is None else self._first_accuracy
            self._accuracies.append(accuracy)
        recent = list(self._records)[-MIN_STEPS:]
        new: list[str] = []
        if len(recent) == MIN_STEPS:
            for rule in list(self._rules):
                warning = rule(recent)
                if warning:
                    self._rules.remove(rule)
                    new.append(warning)
        self.warnings += new
        return new

    def _memorises(self, recent: Sequence[Record]) -> str | None:
        """Warn if the training loss is near 0 while the held-out accuracy stagnates."""
        loss, accuracy = mean(recent, "loss"), mean(recent, "rewards/accuracies")
        if self._first_accuracy is None or self._first_loss is None or len(self._accuracies) < MIN_EVALUATIONS:
            return None
        held_out = sum(self._accuracies) / len(self._accuracies)
        stagnates = held_out - self._first_accuracy < MIN_IMPROVEMENT and accuracy - held_out > MIN_GAP
        # In size, since that of linear-dpo is negative in a good run.
        if not (abs(loss) < NEAR_ZERO_LOSS * abs(self._first_loss) and stagnates):
            return None
        return (
            f"the run memorises its pairs: the training loss is near 0 ({loss:.2g}, at first {self._first_loss:.2g}) "
            f"while the accuracy on held-out pairs stagnates ({held_out:.2f}, at first {self._first_accuracy:.2f}); "
            "stop earlier, lower --lr, or train on more pairs"
        )

    def _explodes(self, recent: Sequence[Record]) -> str | None:
        """Warn if margins explode."""
        margins = [abs(value) for record in recent if (value := record.get("rewards/margins")) is not None]
        margin = sum(margins) / len(margins) if margins else 0.0
        if margin <= EXPLODED_MARGIN:
            return None
        return (
            f"margins explode (mean {margin:.3g} over {MIN_STEPS} steps; good runs end near 1): lower --lr or --gamma, "
            "or stop earlier"
        )

    def _saturates(self, recent: Sequence[Record]) -> str | None:
        """Warn if the sigmoid of the loss is saturated for most states."""
        share = mean(recent, "saturated")
        if not share > SATURATED_SHARE:
            return None
        return (
            f"the sigmoid is saturated for {share:.0%} of the states (mean gradient factor "
            f"{mean(recent, 'gradient_factor'):.2g}, at the reference 0.5), which no longer train the model: lower "
            "--beta, give --beta auto, or stop earlier"
        )

    def _stands_still(self, recent: Sequence[Record]) -> str | None:
        """Warn if the margins stay near 0."""
        margin = mean(recent, "rewards/margins_rms")
        if self._num_judged < STILL_STEPS or not margin < STILL_MARGIN:
            return None
        return (
            f"margins stay near 0 (rms {margin:.2g} after {self._num_judged} steps): the model hardly changes, or beta "
            "is too small to show it; raise --lr or --beta, or give --beta auto"
        )

    def _guesses(self, recent: Sequence[Record]) -> str | None:  # noqa: ARG002  (judged over a longer time)
        """Warn if the implicit accuracy stays at chance, on held-out pairs if there are any."""
        if self._num_held_out:
            if len(self._accuracies) < MIN_EVALUATIONS:
                return None
            accuracy, number = sum(self._accuracies) / MIN_EVALUATIONS, self._num_held_out
            where = "on held-out pairs"
        else:
            if len(self._records) < self._window:
                return None
            accuracy, number = mean(self._records, "rewards/accuracies"), self._num_states
            where = "in training"
        if not accuracy < 1 / 2 + CHANCE_ERRORS / (2 * math.sqrt(number)):
            return None
        return (
            f"the implicit accuracy {where} is at chance after the warm-up ({accuracy:.2f} over {number} states): the "
            "run learns nothing that generalises; check the labels or scores and --reward, then raise --lr"
        )

    def _one_band(self, recent: Sequence[Record]) -> str | None:  # noqa: ARG002  (judged over a longer time)
        """Warn if one timestep band dominates the margin."""
        if len(self._records) < self._window:
            return None
        margins = {band: mean(self._records, banded_name("rewards/margins", band)) for band in self._bands}
        margins = {band: max(margin, 0.0) for band, margin in margins.items() if not math.isnan(margin)}
        total = sum(margins.values())
        if len(margins) <= 1 or total < SMALL_MARGIN * len(margins) or max(margins.values()) < DOMINANT_SHARE * total:
            return None
        band = max(margins, key=lambda band: margins[band])
        return (
            f"one band of timesteps dominates (t {band.start} to {band.stop - 1} has {margins[band] / total:.0%} of "
            "the margin): other noise levels learn little; check --timestep-weighting, and the shards with "
            "`smpo-pipeline inspect`"
        )


def mean(records: Iterable[Record], name: str) -> float:
    """Average a metric over the records that have it; NaN if none has."""
    values = [value for record in records if (value := record.get(name)) is not None]
    return sum(values) / len(values) if values else math.nan
