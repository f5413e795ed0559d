"""Find classes that extend the programs (rewards, objectives, ...): by file, as MODULE:CLASS or by entry point."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from smpo_common.commandline import nearest
from smpo_common.errors import UserError

Base = TypeVar("Base")


def subclasses_in(package: ModuleType, base: type[Base]) -> list[type[Base]]:
    """Import every module of ``package`` and list all subclasses of ``base``, at any depth."""
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return list(_below(base))


def _below(base: type[Base]) -> Iterator[type[Base]]:
    for subclass in base.__subclasses__():
        yield subclass
        yield from _below(subclass)


def offered_by_packages(group: str) -> dict[str, EntryPoint]:
    """List the entry points of a group in installed packages, by name, without importing them."""
    return {point.name: point for point in entry_points(group=group)}


def import_object(place: str, flag: str) -> object:
    """Import an object by its module; the working directory is searched last.

    Args:
        place: ``MODULE:NAME``.
        flag: the flag that named it, for errors.

    Raises:
        UserError: there is no such module, or the module has no such name.
    """
    module_name, _, name = place.partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise UserError(f"{flag} {place}: {module_name!r} is not a module name, such as my_module or package.module")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError, ValueError) as error:
        raise UserError(f"{flag} {place}: {module_name} cannot be imported: {error}") from error
    if not hasattr(module, name):
        raise UserError(f"{flag} {place}: {getattr(module, '__file__', None) or module_name} has no {name!r}")
    return getattr(module, name)


def find_subclass(
    flag: str, name: str, known: Mapping[str, type[Base]], base: type[Base], attributes: Sequence[str]
) -> type[Base]:
    """Return the class of this name, or a user's own.

    Args:
        flag: the flag that named it, for errors.
        name: a name in ``known``, or ``MODULE:CLASS``.
        known: the project's classes.
        base: what a user's class must derive from.
        attributes: class attributes that it must define.

    Raises:
        UserError: there is none, or it is incomplete.
    """
    if name in known:
        return known[name]
    if ":" not in name:
        meant = nearest(name, known)
        hint = f"did you mean {meant}? " if meant else ""
        raise UserError(f"{flag} {name}: {hint}known: {', '.join(sorted(known))}, or your own as MODULE:CLASS")
    kind = import_object(name, flag)
    if not (inspect.isclass(kind) and issubclass(kind, base)):
        raise UserError(f"{flag} {name} is not a subclass of {base.__module__}.{base.__name__}")
    missing = [attribute for attribute in attributes if not hasattr(kind, attribute)]
    missing += sorted(getattr(kind, "__abstractmethods__", ()))
    if missing:
        raise UserError(f"{flag} {name}: the class does not define {', '.join(missing)}")
    return kind


def source_sha256(kind: type) -> str | None:
    """Return the SHA-256 of the source file of a class; None where it has no file.

    It stands for a user's own class in a run's identity, so that the run is not continued by other code.
    """
    source = inspect.getsourcefile(kind)
    return hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else None
