"""Reward mixes: from raw scores to P(image_0 preferred). To add one, add a file with a :class:`Preference` here."""

from __future__ import annotations

import sys

from smpo_common.discovery import subclasses_in
from smpo_common.errors import UserError
from smpo_schemas.preference.base import Preference, ScoredPairs

__all__ = ["Preference", "ScoredPairs", "find_preference", "preferences"]


def preferences() -> dict[str, type[Preference]]:
    """Return every reward mix by name."""
    mixes = subclasses_in(sys.modules[__name__], Preference)  # type: ignore[type-abstract]
    return {mix.name: mix for mix in mixes if "name" in vars(mix)}


def find_preference(name: str) -> type[Preference]:
    """Return the reward mix of that name.

    Raises:
        UserError: there is none.
    """
    known = preferences()
    if name not in known:
        raise UserError(f"unknown --preference {name}; known: {', '.join(sorted(known))}")
    return known[name]
