"""States that cannot be used, since their shard or sample is missing or damaged (``--skip-bad``): said and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


class BadStates:
    """Those of a run.

    Attributes:
        total: how many were left out of steps; one that comes again in a later epoch counts again.
        problems: what is wrong, in words that name the shard or sample, each once.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        """None so far; ``say`` takes a line about each new problem."""
        self._say = say
        self.total = 0
        self.problems: list[str] = []

    def note(self, problems: Iterable[str]) -> None:
        """Say what has not been said before."""
        for problem in problems:
            if problem not in self.problems:
                self.problems.append(problem)
                self._say(f"WARNING: left out: {problem}")

    def skip(self, problems: list[str]) -> None:
        """States were left out of a step: one problem each."""
        self.total += len(problems)
        self.note(problems)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"total": self.total, "problems": self.problems}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint; what was found before the first step is kept."""
        self.total = state["total"]
        self.problems += [problem for problem in state["problems"] if problem not in self.problems]
