"""How a new objective, model family or way of mixing is found: by the file that it is in."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import TypeVar

Base = TypeVar("Base")


def subclasses_in(package: ModuleType, base: type[Base]) -> list[type[Base]]:
    """All subclasses of ``base``, at any depth, once every module of ``package`` is imported."""
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return list(_below(base))


def _below(base: type[Base]) -> Iterator[type[Base]]:
    for subclass in base.__subclasses__():
        yield subclass
        yield from _below(subclass)
