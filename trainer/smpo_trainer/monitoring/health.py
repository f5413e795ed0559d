"""Is a run going well? What its records show of the ways in which preference training commonly fails, in plain words.

Judged from what ``metrics.jsonl`` holds, and nothing else: a run that goes on reads its earlier records and stands
where it stood. The thresholds lie between what a good run and broken ones did on the embedded world
(``benchmarks/health.py``).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from smpo_trainer.monitoring.bands import banded_name, bands
from smpo_trainer.monitoring.metrics import Record

MIN_STEPS = 20
"""Steps after the warm-up over which losses and margins are averaged."""

MIN_STATES = 1000
"""States after the warm-up over which accuracies and bands are averaged, at least: fewer tell nothing from chance."""

MIN_LOOKS = 4
"""Looks at the held-out pairs, the last ones after the warm-up, over which their accuracy is averaged."""

NEAR_ZERO_LOSS = 0.1
"""Share of the first step's loss below which the training loss is near 0."""

STANDING_STILL = 0.03
"""The held-out accuracy stands still if it rose by less since the first look."""

HELD_OUT_BEHIND = 0.1
"""And only matters if it is behind the accuracy in training by this."""

EXPLODED_MARGIN = 10.0
"""Mean absolute margin. At 10 a pair is decided to 1 in 20 000; good runs end near 1."""

CHANCE_ERRORS = 1.5
"""Standard errors that an accuracy must be above 1/2 so as not to be chance."""

ONE_BAND = 2 / 3
"""Share of the margin of all timestep bands that one of them has alone if it does all the work."""

SMALL_MARGIN = 0.01
"""Below this mean margin its share by band is noise."""


Rule = Callable[[Sequence[Record]], str | None]
"""Takes the last :data:`MIN_STEPS` records; says what is wrong, if it is."""


class Health:
    """Looks at the records of a run, in order.

    Attributes:
        warnings: what has been found, each kind once.
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
        """Nothing seen so far.

        Args:
            warmup_steps: of the learning rate; what is judged comes after them.
            states_per_step: over all processes.
            num_held_out: held-out states that are looked at; 0: none.
            num_train_timesteps: T of the model's noise levels.
            uses_reference: whether the objective's loss depends on the reference. Without, margins and accuracies
                against it are not what is trained for, and are not judged.
        """
        self._warmup_steps, self._num_held_out = warmup_steps, num_held_out
        self._bands = bands(num_train_timesteps)
        self._window = max(MIN_STEPS, math.ceil(MIN_STATES / states_per_step))
        self._num_states = self._window * states_per_step
        self._records: deque[Record] = deque(maxlen=self._window)
        self._looks: deque[float] = deque(maxlen=MIN_LOOKS)
        self._first_look: float | None = None
        self._first_loss: float | None = None
        self._rules: list[Rule] = [self._memorises]
        if uses_reference:
            self._rules += [self._explodes, self._guesses, self._one_band]
        self.warnings: list[str] = []

    def look(self, record: Record) -> list[str]:
        """Take a step's record; returns what is found for the first time."""
        if self._first_loss is None:
            self._first_loss = record.get("loss")
        if int(record["step"] or 0) <= self._warmup_steps:
            return []
        self._records.append(record)
        look = record.get("val/rewards/accuracies")
        if look is not None:
            self._first_look = look if self._first_look is None else self._first_look
            self._looks.append(look)
        recent = list(self._records)[-MIN_STEPS:]
        found: list[str] = []
        if len(recent) == MIN_STEPS:
            for rule in list(self._rules):
                warning = rule(recent)
                if warning:
                    self._rules.remove(rule)
                    found.append(warning)
        self.warnings += found
        return found

    def _memorises(self, recent: Sequence[Record]) -> str | None:
        """Training loss near 0 while the held-out accuracy stands still."""
        loss, accuracy = mean(recent, "loss"), mean(recent, "rewards/accuracies")
        if self._first_look is None or self._first_loss is None or len(self._looks) < MIN_LOOKS:
            return None
        held_out = sum(self._looks) / len(self._looks)
        still = held_out - self._first_look < STANDING_STILL and accuracy - held_out > HELD_OUT_BEHIND
        if not (loss < NEAR_ZERO_LOSS * self._first_loss and still):
            return None
        return (
            f"the training loss is near 0 ({loss:.2g}, at first {self._first_loss:.2g}) while the accuracy on held-out "
            f"pairs stands still ({held_out:.2f}, at first {self._first_look:.2f}): the run learns its pairs by heart; "
            "stop earlier, lower --lr, or train on more pairs"
        )

    def _explodes(self, recent: Sequence[Record]) -> str | None:
        """Margins exploding."""
        margins = [abs(value) for record in recent if (value := record.get("rewards/margins")) is not None]
        margin = sum(margins) / len(margins) if margins else 0.0
        if margin <= EXPLODED_MARGIN:
            return None
        return (
            f"margins explode (mean {margin:.3g} over {MIN_STEPS} steps; good runs end near 1): pairs that are long "
            "decided are still pushed apart; lower --lr or --gamma, or stop earlier"
        )

    def _guesses(self, recent: Sequence[Record]) -> str | None:  # noqa: ARG002  (judged over a longer time)
        """Implicit accuracy at chance after the warm-up; on held-out pairs, where there are any."""
        if self._num_held_out:
            if len(self._looks) < MIN_LOOKS:
                return None
            accuracy, number, where = sum(self._looks) / MIN_LOOKS, self._num_held_out, "on held-out pairs"
        else:
            if len(self._records) < self._window:
                return None
            accuracy, number, where = mean(self._records, "rewards/accuracies"), self._num_states, "in training"
        if not accuracy < 1 / 2 + CHANCE_ERRORS / (2 * math.sqrt(number)):
            return None
        return (
            f"the implicit accuracy {where} is at chance after the warm-up ({accuracy:.2f} over {number} states): "
            "nothing is learned that holds for other pairs; check the labels or scores and --reward, then raise --lr"
        )

    def _one_band(self, recent: Sequence[Record]) -> str | None:  # noqa: ARG002  (judged over a longer time)
        """One timestep band doing all the work."""
        if len(self._records) < self._window:
            return None
        margins = {band: mean(self._records, banded_name("rewards/margins", band)) for band in self._bands}
        margins = {band: max(margin, 0.0) for band, margin in margins.items() if not math.isnan(margin)}
        total = sum(margins.values())
        if len(margins) <= 1 or total < SMALL_MARGIN * len(margins) or max(margins.values()) < ONE_BAND * total:
            return None
        band = max(margins, key=lambda each: margins[each])
        return (
            f"one band of timesteps does all the work (t {band.start} to {band.stop - 1} has "
            f"{margins[band] / total:.0%} of the margin): other noise levels learn nothing; check "
            "--timestep-weighting, and the health of the shards with `smpo-pipeline inspect`"
        )


def mean(records: Iterable[Record], name: str) -> float:
    """Mean of what the records have of a metric; NaN where none has any."""
    values = [value for record in records if (value := record.get(name)) is not None]
    return sum(values) / len(values) if values else math.nan
