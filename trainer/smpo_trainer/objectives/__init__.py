"""One file an objective; a new file here is found by itself, a user's own class by where it is."""

from __future__ import annotations

import hashlib
import inspect
import sys
from pathlib import Path

from smpo_common.discovery import import_object, offered_by_packages, subclasses_in
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
    """Every objective of this folder by its name."""
    found = subclasses_in(sys.modules[__name__], Objective)  # type: ignore[type-abstract]
    return {each.name: each for each in found if _is_built_in(each) and not inspect.isabstract(each)}


def offered_objectives() -> list[str]:
    """The names of the objectives that installed packages offer, not imported."""
    return sorted(offered_by_packages(_GROUP))


def find_objective(name: str) -> type[Objective]:
    """The objective of that name: one of this folder, ``MODULE:CLASS``, or the name of a package's entry point.

    Raises:
        UserError: there is none, or what has the name cannot be used as one.
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
        raise UserError(f"--objective {name}: the package's class calls itself {kind.name!r}; both names must agree")
    return kind


def code_fingerprint(kind: type[Objective]) -> str | None:
    """SHA-256 of the source file of a user's own objective; None for those of this folder, or without a file.

    A continued run must have the same: the loss of a run must not change in its middle.
    """
    source = None if _is_built_in(kind) else inspect.getsourcefile(kind)
    return hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else None


def _is_built_in(kind: type[Objective]) -> bool:
    return kind.__module__.startswith(f"{__name__}.")


def _checked(kind: object, name: str) -> type[Objective]:
    """``kind``, if it can be trained with.

    Raises:
        UserError: it cannot.
    """
    if not (inspect.isclass(kind) and issubclass(kind, Objective)):
        raise UserError(f"--objective {name} is no subclass of smpo_trainer.objectives.Objective")
    lacking = [each for each in ("name", "summary", "uses_rewards", "needs") if not hasattr(kind, each)]
    lacking += sorted(kind.__abstractmethods__)
    if lacking:
        raise UserError(f"--objective {name}: the class does not define {', '.join(lacking)}")
    if objectives().get(kind.name, kind) is not kind:
        raise UserError(f"--objective {name}: the name {kind.name!r} is that of a built-in objective; choose another")
    return kind
