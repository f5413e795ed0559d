"""One file an objective; a new file here is found by itself."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

from smpo_schemas.errors import UserError
from smpo_trainer.objectives.base import Objective, ObjectiveOptions


def objectives() -> dict[str, type[Objective]]:
    """Every objective by its name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    found = _below(Objective)  # type: ignore[type-abstract]
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


def _below(base: type[Objective]) -> Iterator[type[Objective]]:
    for subclass in base.__subclasses__():
        yield subclass
        yield from _below(subclass)


__all__ = ["Objective", "ObjectiveOptions", "find_objective", "objectives"]
