"""The weighted min-max mix; with one reward, that of SmPO-Diffusion's code (arXiv 2506.02698).

With r' = (r - min) / (max - min) over the data set, p = sigmoid(sum_k w_k (r'_k0 - r'_k1)). The weights are not
normalised: doubling them doubles the logit. Whether the paper means this sum for several rewards was not verified.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np

from smpo_schemas.preference.base import Preference, ScoredPairs, sigmoid
from smpo_schemas.scoring.scores import RewardStatistics


def minmax(
    scores: Mapping[str, np.ndarray], statistics: Mapping[str, RewardStatistics], weights: Mapping[str, float]
) -> np.ndarray:
    """Compute P(image_0 preferred), float64 [P] in (0, 1), from each reward's scores, float [P, 2].

    Raises:
        UserError: a weighted reward was not scored, or is constant over the data set.
    """
    return MinMax(weights, statistics).probability(ScoredPairs(scores))


class MinMax(Preference):
    """Scales each reward to [0, 1] and sums them by weight."""

    name: ClassVar[str] = "minmax"
    summary: ClassVar[str] = (
        "sigmoid of the weighted sum of score differences, each divided by max - min over the data set"
    )
    calibration: ClassVar[Literal["refused", "optional", "required"]] = "refused"

    def probability(self, pairs: ScoredPairs) -> np.ndarray:
        """See the base class."""
        return sigmoid(self.margins(pairs) @ np.array(list(self.weights.values())))
