"""Objectives, one per file; a new file in this folder is found automatically, a user's own class by MODULE:CLASS."""

from __future__ import annotations

import inspect
import sys

from smpo_common.discovery import import_object, offered_by_packages, source_sha256, subclasses_in
from smpo_common.errors import UserError
from smpo_trainer.objectives.base import Objective, ObjectiveOptions, PairBatch

__all__ = [
    "Objective",
    "ObjectiveOptions",
    "PairBatch",
    "code_fingerprint",
    "find_objective",
    "objectives",
    "offered_objectives",
]

_GROUP = "smpo.objectives"


def objectives() -> dict[str, type[Objective]]:
    """Return every objective of this folder by name."""
    kinds = subclasses_in(sys.modules[__name__], Objective)  # type: ignore[type-abstract]
    return {kind.name: kind for kind in kinds if _is_built_in(kind) and not inspect.isabstract(kind)}


def offered_objectives() -> list[str]:
    """Return the names of objectives that installed packages offer, without importing them."""
    return sorted(offered_by_packages(_GROUP))


def find_objective(name: str) -> type[Objective]:
    """Return the objective of this name: one of this folder, ``MODULE:CLASS``, or the name of an entry point.

    Raises:
        UserError: it does not exist, or is not a valid objective.
    """
    known = objectives()
    if name in known:
        return known[name]
    if ":" in name:
        return _checked(import_object(name, "--objective"), name)
    offered = offered_by_packages(_GROUP)
    if name not in offered:
        names = ", ".join(sorted({*known, *offered}))
        raise UserError(f"--objective {name} is not known; known: {names}, or your own as MODULE:CLASS")
    kind = _checked(import_object(offered[name].value, "--objective"), name)
    if kind.name != name:
        raise UserError(
            f"--objective {name}: the class of this entry point has the name {kind.name!r}; both names must be equal"
        )
    return kind


def code_fingerprint(kind: type[Objective]) -> str | None:
    """Return the SHA-256 of the source file of a user's own objective; None for those of this folder or without a file.

    It is part of a run's identity, so that the loss does not change when the run is resumed.
    """
    return None if _is_built_in(kind) else source_sha256(kind)


def _is_built_in(kind: type[Objective]) -> bool:
    return kind.__module__.startswith(f"{__name__}.")


def _checked(kind: object, name: str) -> type[Objective]:
    """Return ``kind`` if it is a valid objective.

    Raises:
        UserError: it is not.
    """
    if not (inspect.isclass(kind) and issubclass(kind, Objective)):
        raise UserError(f"--objective {name} is not a subclass of smpo_trainer.objectives.Objective")
    missing = [attribute for attribute in ("name", "summary", "uses_rewards", "needs") if not hasattr(kind, attribute)]
    missing += sorted(kind.__abstractmethods__)
    if missing:
        raise UserError(f"--objective {name}: the class does not define {', '.join(missing)}")
    if objectives().get(kind.name, kind) is not kind:
        raise UserError(f"--objective {name}: a built-in objective has the name {kind.name!r}; choose another name")
    return kind
