"""The judge that compares the scores of the table."""

from __future__ import annotations

import math
from typing import ClassVar

from smpo_pipeline.selection.judges.base import JudgedImage, PairwiseJudge


class RewardsJudge(PairwiseJudge):
    """P(first preferred) = sum_k w_k sigmoid((r_k,first - r_k,second) / scale_k), as ``--preference mixture``."""

    name: ClassVar[str] = "rewards"
    summary: ClassVar[str] = "by their scores"
    needs_images: ClassVar[bool] = False

    def compare(self, first: JudgedImage, second: JudgedImage, prompt: str) -> float:  # noqa: ARG002
        """See the base class."""
        terms = (
            # tanh does not overflow.
            weight * (1 + math.tanh((first.scores[name] - second.scores[name]) / self.scales[name] / 2)) / 2
            for name, weight in self.weights.items()
        )
        return min(1.0, math.fsum(terms))  # shares may sum to a little more than 1
