"""The schedule of beta over a run (``--beta-decay``), as in PNAPO (arXiv 2605.09433)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from smpo_common.errors import UserError


@dataclass(frozen=True)
class BetaDecay:
    """A factor of beta that falls along a cosine.

    Attributes:
        start: last optimizer step, from 1, with the factor 1 (the paper's n1).
        stop: first step with the factor ``end`` (n2).
        end: the last factor, above 0 and up to 1; 1/2 in the paper.
    """

    start: int
    stop: int
    end: float

    @classmethod
    def parse(cls, value: object) -> Self | None:
        """Read ``N1:N2:END``; None and a finished schedule are returned as they are.

        Raises:
            UserError: the text has another form, or its numbers are out of bounds.
        """
        if value is None or isinstance(value, cls):
            return value
        try:
            start, stop, end = str(value).split(":")
            decay = cls(int(start), int(stop), float(end))
        except ValueError:
            decay = cls(0, 0, 0.0)
        if not (0 <= decay.start < decay.stop and 0 < decay.end <= 1):
            raise UserError(
                f"--beta-decay {value}: expected N1:N2:END with whole numbers 0 <= N1 < N2 and 0 < END <= 1, such as "
                "100:200:0.5 (in a config file in quotes)"
            )
        return decay

    def __str__(self) -> str:
        """Invert :meth:`parse`."""
        return f"{self.start}:{self.stop}:{self.end!r}"

    def factor(self, step: int) -> float:
        """Return the factor of beta at optimizer step ``step``, from 1."""
        progress = min(max((step - self.start) / (self.stop - self.start), 0.0), 1.0)
        return 1 - (1 - self.end) * (1 - math.cos(math.pi * progress)) / 2
