"""Steps whose loss or gradient is not finite: left out, counted, and, if there are too many in a row, the end of a run.

Their samples are kept in ``nonfinite.jsonl``, one JSON object a skipped step.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smpo_common.errors import UserError
from smpo_common.files import write_bytes

NONFINITE_FILE = "nonfinite.jsonl"

_NAMED_PAIRS = 8
"""How many pair ids a message lists."""


@dataclass(frozen=True)
class SkippedStep:
    """One of them.

    Attributes:
        step: from 1, as in ``metrics.jsonl``.
        bad_pairs: pairs whose loss is not finite; none where only the gradient is not.
        pairs: all pairs of the step.
    """

    step: int
    bad_pairs: list[str]
    pairs: list[str]

    def describe(self) -> str:
        """What is wrong with it."""
        if not self.bad_pairs:
            return "the gradient is not finite"
        named = ", ".join(self.bad_pairs[:_NAMED_PAIRS])
        more = f" and {len(self.bad_pairs) - _NAMED_PAIRS} more" if len(self.bad_pairs) > _NAMED_PAIRS else ""
        return f"the loss is not finite for pair {named}{more}"


class SkippedSteps:
    """The skipped steps of a run.

    Attributes:
        total: how many there were, the overflows of a gradient scaler included.
    """

    def __init__(self, out: Path, limit: int) -> None:
        """None so far; ``limit`` in a row end the run whose output folder is ``out``."""
        self._path, self._limit = out / NONFINITE_FILE, limit
        self.total = 0
        self._in_a_row = 0
        self._steps: list[SkippedStep] = []

    def took(self) -> None:
        """A step was made."""
        self._in_a_row = 0

    def overflowed(self) -> None:
        """A gradient scaler (fp16) met an infinity, as it does in its normal course, and lowers its scale."""
        self.total += 1

    def skip(self, skipped: SkippedStep) -> None:
        """A step was left out."""
        self.total += 1
        self._in_a_row += 1
        self._steps.append(skipped)

    def write(self) -> None:
        """Keep the samples; for the main process alone."""
        if self._steps or self._path.is_file():
            write_bytes(self._path, b"".join(json.dumps(asdict(step)).encode() + b"\n" for step in self._steps))

    def require_few(self) -> None:
        """Refuse to go on with too many in a row.

        Raises:
            UserError: the last step was one too many.
        """
        if self._in_a_row >= self._limit:
            last = self._steps[-1]
            raise UserError(
                f"step {last.step}: {last.describe()}, and {self._in_a_row} steps in a row were skipped so; "
                f"their pairs are in {self._path}. Training has diverged, or these pairs are broken: lower --lr, raise "
                "--warmup-steps, or use a wider --dtype (the last checkpoint is kept)"
            )

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"total": self.total, "in_a_row": self._in_a_row, "steps": [asdict(step) for step in self._steps]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint."""
        self.total, self._in_a_row = state["total"], state["in_a_row"]
        self._steps = [SkippedStep(**step) for step in state["steps"]]
