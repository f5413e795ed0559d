"""Pairwise judges (``--judge``), one file each; to add one, add a file with a :class:`PairwiseJudge` here."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from smpo_common.discovery import find_subclass, subclasses_in
from smpo_pipeline.selection.judges.base import JudgedImage, PairwiseJudge, Verdict, in_both_orders

__all__ = ["JudgedImage", "PairwiseJudge", "Verdict", "find_judge", "in_both_orders", "judges", "make_judge"]


def judges() -> dict[str, type[PairwiseJudge]]:
    """Return every judge of this folder by name."""
    kinds = subclasses_in(sys.modules[__name__], PairwiseJudge)  # type: ignore[type-abstract]
    return {kind.name: kind for kind in kinds if kind.__module__.startswith(f"{__name__}.")}


def find_judge(spec: str) -> type[PairwiseJudge]:
    """Return the judge of ``NAME[=MODEL]`` or, a user's own, ``MODULE:CLASS[=MODEL]``.

    Raises:
        UserError: it does not exist, or is not a complete :class:`PairwiseJudge`.
    """
    name = spec.partition("=")[0]
    return find_subclass("--judge", name, judges(), PairwiseJudge, ("name",))  # type: ignore[type-abstract]


def make_judge(spec: str, weights: Mapping[str, float], scales: Mapping[str, float]) -> PairwiseJudge:
    """Make the judge of :func:`find_judge`; for the arguments see :class:`PairwiseJudge`.

    Raises:
        UserError: there is no such judge, or it cannot use its MODEL.
    """
    kind, model = find_judge(spec), spec.partition("=")[2]
    return kind(weights, scales, model) if model else kind(weights, scales)
