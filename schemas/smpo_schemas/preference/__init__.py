"""What scores mean: from raw rewards to P(image_0 preferred).

One file a way of mixing; a new file is found by itself.
"""

from __future__ import annotations

import importlib
import pkgutil

from smpo_schemas.errors import UserError
from smpo_schemas.preference.base import Preference, ScoredPairs

__all__ = ["Preference", "ScoredPairs", "find_preference", "preferences"]


def preferences() -> dict[str, type[Preference]]:
    """Every way of mixing by its name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return {way.name: way for way in Preference.__subclasses__()}


def find_preference(name: str) -> type[Preference]:
    """The way of mixing of that name.

    Raises:
        UserError: there is none.
    """
    known = preferences()
    if name not in known:
        raise UserError(f"--preference {name} is not known; known: {', '.join(sorted(known))}")
    return known[name]
