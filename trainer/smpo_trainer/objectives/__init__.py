"""One file an objective; a new file here is found by itself."""

from __future__ import annotations

import importlib
import pkgutil

from smpo_schemas.errors import UserError
from smpo_trainer.objectives.base import Objective, ObjectiveOptions


def objectives() -> dict[str, type[Objective]]:
    """Every objective by its name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return {objective.name: objective for objective in Objective.__subclasses__()}


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
