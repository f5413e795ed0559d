"""Exports of a package that are imported on first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_exports(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make ``__getattr__`` and ``__dir__`` (PEP 562) for a package whose exports take long to import.

    Args:
        package: its ``__name__``.
        names: exported names, by the module that defines them.
    """
    modules = {name: module for module, exported in names.items() for name in exported}

    def get(name: str) -> Any:  # noqa: ANN401  (each export's type is in the package's TYPE_CHECKING block)
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(modules[name]), name)

    def names_of() -> list[str]:
        return sorted(modules)

    return get, names_of
