"""The best image against the worst, as CaPO pairs the candidates of one reward (arXiv 2502.02588)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from smpo_pipeline.selection.methods.base import Candidates, NoPairError, Proposal, Selection
from smpo_schemas.reject_kinds import RejectKind


class Extremes(Selection):
    """Pairs by the weighted mean of the rewards' win rates: best and worst, second best and second worst, and so on.

    Equal images are ordered by their hashes. The gap is the difference of the mean win rates.
    """

    name: ClassVar[str] = "extremes"
    summary: ClassVar[str] = "best against worst by the mean win rate, then second best against second worst"

    def propose(self, candidates: Candidates) -> Iterator[Proposal]:
        """See the base class."""
        rates_N = candidates.mean_rates()
        if rates_N.max() == rates_N.min():
            raise NoPairError(RejectKind.ALL_EQUAL)
        best, worst = np.argsort(-rates_N, kind="stable"), np.argsort(rates_N, kind="stable")
        for chosen, rejected in zip(best.tolist(), worst[: len(rates_N) // 2].tolist(), strict=False):
            yield Proposal(chosen, rejected, float(rates_N[chosen] - rates_N[rejected]))
