"""What scores mean: from raw rewards to P(image_0 preferred).

One file a way of mixing; a new file is found by itself.
"""

from __future__ import annotations

import sys

from smpo_common.discovery import subclasses_in
from smpo_common.errors import UserError
from smpo_schemas.preference.base import Preference, ScoredPairs

__all__ = ["Preference", "ScoredPairs", "find_preference", "preferences"]


def preferences() -> dict[str, type[Preference]]:
    """Every way of mixing by its name."""
    found = subclasses_in(sys.modules[__name__], Preference)  # type: ignore[type-abstract]
    return {way.name: way for way in found if "name" in vars(way)}


def find_preference(name: str) -> type[Preference]:
    """The way of mixing of that name.

    Raises:
        UserError: there is none.
    """
    known = preferences()
    if name not in known:
        raise UserError(f"--preference {name} is not known; known: {', '.join(sorted(known))}")
    return known[name]
