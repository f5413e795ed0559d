"""Steps whose loss or gradient is not finite: they are skipped and counted; too many in a row end the run.

Their pairs are listed in ``nonfinite.jsonl``, one JSON object per skipped step.
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
"""Number of pair ids in a message."""


@dataclass(frozen=True)
class SkippedStep:
    """A skipped step.

    Attributes:
        step: number of the step, from 1, as in ``metrics.jsonl``.
        bad_pairs: pairs whose loss is not finite; empty if only the gradient is not.
        pairs: all pairs of the step.
    """

    step: int
    bad_pairs: list[str]
    pairs: list[str]

    def describe(self) -> str:
        """Describe why it was skipped."""
        if not self.bad_pairs:
            return "the gradient is not finite"
        named = ", ".join(self.bad_pairs[:_NAMED_PAIRS])
        more = f" and {len(self.bad_pairs) - _NAMED_PAIRS} more" if len(self.bad_pairs) > _NAMED_PAIRS else ""
        return f"the loss is not finite for pair {named}{more}"


class SkippedSteps:
    """The skipped steps of a run.

    Attributes:
        total: their number, including overflows of the gradient scaler.
    """

    def __init__(self, out: Path, limit: int) -> None:
        """Start without skipped steps; ``limit`` in a row end the run in the folder ``out``."""
        self._path, self._limit = out / NONFINITE_FILE, limit
        self.total = 0
        self._in_a_row = 0
        self._steps: list[SkippedStep] = []

    def reset_row(self) -> None:
        """Reset the number of skipped steps in a row, after a step that was taken."""
        self._in_a_row = 0

    def count_overflow(self) -> None:
        """Count a step that the gradient scaler skipped in fp16, which is normal, since it then lowers its scale."""
        self.total += 1

    def add(self, skipped: SkippedStep) -> None:
        """Add a step with a loss or gradient that is not finite."""
        self.total += 1
        self._in_a_row += 1
        self._steps.append(skipped)

    def write(self) -> None:
        """Write ``nonfinite.jsonl``; for the main process only."""
        if self._steps or self._path.is_file():
            write_bytes(self._path, b"".join(json.dumps(asdict(step)).encode() + b"\n" for step in self._steps))

    def require_few(self) -> None:
        """End the run after too many skipped steps in a row.

        Raises:
            UserError: the limit is reached.
        """
        if self._in_a_row >= self._limit:
            last = self._steps[-1]
            raise UserError(
                f"step {last.step}: {last.describe()}; {self._in_a_row} steps in a row were skipped (--max-skipped), "
                f"see {self._path} for their pairs. Training has diverged, or these pairs are broken: lower --lr, "
                "raise --warmup-steps, or use a wider --dtype (the last checkpoint is kept)"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"total": self.total, "in_a_row": self._in_a_row, "steps": [asdict(step) for step in self._steps]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.total, self._in_a_row = state["total"], state["in_a_row"]
        self._steps = [SkippedStep(**step) for step in state["steps"]]
