"""Pairs between the frontiers of several rewards, as CaPO selects them (arXiv 2502.02588).

Image i dominates j if no reward prefers j and one prefers i. The upper frontier holds the images that none dominates,
the lower frontier those that dominate none. A chosen image is on the upper frontier only, a rejected one on the lower
only.

CaPO draws a pair at each training step; here ``--pairs-per-prompt`` pairs are drawn once, without replacement. As in
the paper the rejected image need not be one that the chosen image dominates, so that the gap may be negative.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from smpo_pipeline.selection.methods.base import Candidates, NoPairError, Proposal, Selection
from smpo_schemas.reject_kinds import RejectKind

_COMPARISONS_AT_ONCE = 1 << 20
"""Bounds the memory for a prompt with very many images."""


def frontiers(scores_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the images that none dominates and those that dominate none: two bool [N].

    Win rates grow with the score, so those of the raw scores are those of the win rates.
    """
    count = len(scores_NK)
    upper, lower = np.ones(count, dtype=bool), np.ones(count, dtype=bool)
    rows = max(1, _COMPARISONS_AT_ONCE // scores_NK.size)
    for start in range(0, count, rows):
        dominates = _dominates(scores_NK[start : start + rows], scores_NK)
        upper &= ~dominates.any(axis=0)
        lower[start : start + rows] &= ~dominates.any(axis=1)
    return upper, lower


def _dominates(first_AK: np.ndarray, second_BK: np.ndarray) -> np.ndarray:
    """Whether each of the first images dominates each of the second: bool [A, B]."""
    shape = (len(first_AK), len(second_BK))
    no_worse, better = np.ones(shape, dtype=bool), np.zeros(shape, dtype=bool)
    for first_A, second_B in zip(first_AK.T, second_BK.T, strict=True):
        no_worse &= first_A[:, None] >= second_B
        better |= first_A[:, None] > second_B
    return no_worse & better


class Pareto(Selection):
    """Draws pairs by (seed, prompt); the gap is the difference of the mean win rates."""

    name: ClassVar[str] = "pareto"
    summary: ClassVar[str] = "random pairs of the upper and the lower Pareto frontier of the rewards (CaPO)"
    flags: ClassVar[frozenset[str]] = frozenset({"dominated_only"})
    any_gap: ClassVar[bool] = True

    def propose(self, candidates: Candidates) -> Iterator[Proposal]:
        """See the base class."""
        upper, lower = frontiers(candidates.scores_NK)
        chosen_U, rejected_L = np.flatnonzero(upper & ~lower), np.flatnonzero(lower & ~upper)
        if not (len(chosen_U) and len(rejected_L)):
            equal = bool((candidates.scores_NK == candidates.scores_NK[0]).all())
            raise NoPairError(RejectKind.ALL_EQUAL if equal else RejectKind.NO_FRONTIER_PAIR)
        rates_N = candidates.mean_rates()
        gap_UL = rates_N[chosen_U][:, None] - rates_N[rejected_L]
        usable_UL = np.ones(gap_UL.shape, dtype=bool)
        if self.rules.dominated_only:
            usable_UL = _dominates(candidates.scores_NK[chosen_U], candidates.scores_NK[rejected_L])
        if self.rules.min_gap is not None:
            if not (gap_UL[usable_UL] >= self.rules.min_gap).any():
                raise self.too_small(float(gap_UL[usable_UL].max(initial=-1)))
            usable_UL &= gap_UL >= self.rules.min_gap
        pairs = np.argwhere(usable_UL)
        for u, l in candidates.stream.permutation(pairs)[: self.rules.pairs_per_prompt]:  # noqa: E741
            yield Proposal(int(chosen_U[u]), int(rejected_L[l]), float(gap_UL[u, l]))
