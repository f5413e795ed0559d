"""A beta that follows the margins (``--beta auto``).

A margin is beta / 2 times a difference of errors, whose size depends on the model, the data and how far training has
gone. With a fixed beta, margins may be so large that the sigmoid of the loss is saturated, or so small that it is
practically linear. Here beta moves such that the root mean square of the margins stays in a band. The rule is our own.

This module does not import torch: ``--help`` uses it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

from smpo_common.errors import UserError

RANGE = 1000.0
"""Beta stays between its start divided and multiplied by this."""

_MEMORY = 0.9
"""Weight of the earlier steps in the moving average of the log margin, which thus covers about ten steps."""


@dataclass(frozen=True)
class AutoBeta:
    """``--beta auto[:START]``.

    Attributes:
        start: beta until the end of the warm-up; None for the published one.
    """

    start: float | None = None

    @classmethod
    def parse(cls, value: object) -> Self | float | None:
        """Read ``auto``, ``auto:START`` or a number; other values are returned as they are.

        Raises:
            UserError: the text has another form.
        """
        if not isinstance(value, str):
            return value  # type: ignore[return-value]  # pydantic checks it
        if value == "auto":
            return cls()
        name, _, start = value.rpartition(":")
        try:
            number = float(start)
        except ValueError:
            number = math.nan
        if not name and not math.isnan(number):
            return number
        if name != "auto" or not 0 < number < math.inf:
            raise UserError(f"--beta {value}: expected a number, auto, or auto:START with START above 0")
        return cls(number)

    def __str__(self) -> str:
        """Invert :meth:`parse`."""
        return "auto" if self.start is None else f"auto:{self.start!r}"


@dataclass(frozen=True)
class Band:
    """``--beta-band LOW:HIGH``: bounds of the root mean square of the margins."""

    low: float
    high: float

    @classmethod
    def parse(cls, value: object) -> Self:
        """Read ``LOW:HIGH``; a band is returned as it is.

        Raises:
            UserError: the text has another form, or its numbers are out of bounds.
        """
        if isinstance(value, cls):
            return value
        try:
            low, high = (float(part) for part in str(value).split(":"))
        except ValueError:
            low, high = 0.0, 0.0
        if not 0 < low <= high < math.inf:
            raise UserError(
                f"--beta-band {value}: expected LOW:HIGH with 0 < LOW <= HIGH, such as 1.5:3 (in a config file in "
                "quotes)"
            )
        return cls(low, high)

    def __str__(self) -> str:
        """Invert :meth:`parse`."""
        return f"{self.low!r}:{self.high!r}"


class BetaController:
    """Moves beta after each step.

    Attributes:
        beta: beta of the next step.
    """

    def __init__(self, start: float, band: Band, rate: float, warmup_steps: int) -> None:
        """Begin at ``start``.

        Args:
            start: beta of the first steps.
            band: bounds of the margins' root mean square.
            rate: largest factor between the betas of two steps, above 1.
            warmup_steps: steps after which beta moves.
        """
        self.beta = start
        self._start, self._band, self._rate, self._warmup_steps = start, band, rate, warmup_steps
        self._log_unit: float | None = None

    def update(self, step: int, margin: float | None) -> None:
        """Update beta by the margins' root mean square at optimizer step ``step``, from 1; None and 0 are ignored.

        The logarithm of the margin at beta 1 is averaged over steps. If this average, at the present beta, is outside
        the band, beta moves towards the nearer bound, by the factor ``rate`` at most.
        """
        if step <= self._warmup_steps or not margin or not math.isfinite(margin):
            return
        log_unit = math.log(margin / self.beta)
        self._log_unit = log_unit if self._log_unit is None else _MEMORY * self._log_unit + (1 - _MEMORY) * log_unit
        unit = math.exp(self._log_unit)
        wanted = min(max(self.beta, self._band.low / unit), self._band.high / unit)
        moved = min(max(wanted, self.beta / self._rate), self.beta * self._rate)
        self.beta = min(max(moved, self._start / RANGE), self._start * RANGE)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"beta": self.beta, "log_unit": self._log_unit}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.beta, self._log_unit = state["beta"], state["log_unit"]
