"""A mixture of populations of annotators, one behind each reward.

p = sum_k w_k sigmoid((r_k0 - r_k1) / tau_k): a share w_k of the annotators chooses by reward k, each with the
Bradley-Terry noise of a temperature tau_k, in units of that reward's raw score. Both come from labels
(``smpo-pipeline calibrate``). Other than in a sum of rewards, populations that disagree leave p near one half
however sure each of them is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np

from smpo_schemas.preference.base import Preference, ScoredPairs, shares, sigmoid
from smpo_schemas.scores import RewardStatistics


class Mixture(Preference):
    """Weights are shares: they are scaled to sum to 1."""

    name: ClassVar[str] = "mixture"
    calibration: ClassVar[Literal["refused", "optional", "required"]] = "required"

    def __init__(
        self,
        weights: Mapping[str, float],
        statistics: Mapping[str, RewardStatistics],
        temperatures: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(shares(weights), statistics, temperatures)

    def probability(self, pairs: ScoredPairs) -> np.ndarray:
        """See the base class."""
        return sigmoid(self.margins(pairs)) @ np.array(list(self.weights.values()))
