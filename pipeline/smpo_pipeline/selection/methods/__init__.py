"""Methods of selection (``--by``), one file each; to add one, add a file with a :class:`Selection` here."""

from __future__ import annotations

import sys

from smpo_common.discovery import find_subclass, subclasses_in
from smpo_pipeline.selection.methods.base import Candidates, NoPairError, Proposal, Rules, Selection

__all__ = ["Candidates", "NoPairError", "Proposal", "Rules", "Selection", "find_selection", "selections"]


def selections() -> dict[str, type[Selection]]:
    """Return every method of this folder by name."""
    kinds = subclasses_in(sys.modules[__name__], Selection)  # type: ignore[type-abstract]
    return {kind.name: kind for kind in kinds if kind.__module__.startswith(f"{__name__}.")}


def find_selection(name: str) -> type[Selection]:
    """Return the method of this name, or a user's own as ``MODULE:CLASS``.

    Raises:
        UserError: it does not exist, or is not a complete :class:`Selection`.
    """
    return find_subclass("--by", name, selections(), Selection, ("name", "summary"))  # type: ignore[type-abstract]
