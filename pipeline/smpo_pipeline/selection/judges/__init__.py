"""Pairwise judges (``--judge``), one file each; to add one, add a file with a :class:`PairwiseJudge` here."""

from __future__ import annotations

import sys

from smpo_common.discovery import find_subclass, subclasses_in
from smpo_pipeline.selection.judges.base import JudgedImage, PairwiseJudge, in_both_orders

__all__ = ["JudgedImage", "PairwiseJudge", "find_judge", "in_both_orders", "judges"]


def judges() -> dict[str, type[PairwiseJudge]]:
    """Return every judge of this folder by name."""
    kinds = subclasses_in(sys.modules[__name__], PairwiseJudge)  # type: ignore[type-abstract]
    return {kind.name: kind for kind in kinds if kind.__module__.startswith(f"{__name__}.")}


def find_judge(name: str) -> type[PairwiseJudge]:
    """Return the judge of this name, or a user's own as ``MODULE:CLASS``.

    Raises:
        UserError: it does not exist, or is not a complete :class:`PairwiseJudge`.
    """
    return find_subclass("--judge", name, judges(), PairwiseJudge, ("name",))  # type: ignore[type-abstract]
