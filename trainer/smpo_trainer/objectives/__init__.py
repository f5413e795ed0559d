"""One file an objective; a new file here is found by itself."""

from __future__ import annotations

import inspect
import sys

from smpo_common.discovery import subclasses_in
from smpo_common.errors import UserError
from smpo_trainer.objectives.base import Objective, ObjectiveOptions


def objectives() -> dict[str, type[Objective]]:
    """Every objective by its name."""
    found = subclasses_in(sys.modules[__name__], Objective)  # type: ignore[type-abstract]
    return {objective.name: objective for objective in found if not inspect.isabstract(objective)}


def find_objective(name: str) -> type[Objective]:
    """The objective of that name.

    Raises:
        UserError: there is none.
    """
    known = objectives()
    if name not in known:
        raise UserError(f"--objective {name} is not known; known: {', '.join(sorted(known))}")
    return known[name]


__all__ = ["Objective", "ObjectiveOptions", "find_objective", "objectives"]
