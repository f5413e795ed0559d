"""A mixture of groups of annotators, one per reward.

p = sum_k w_k sigmoid((r_k0 - r_k1) / tau_k): a share w_k of the annotators chooses by reward k, with Bradley-Terry
noise of temperature tau_k, in units of that reward's raw score. ``smpo-pipeline calibrate`` fits both to labels. Unlike
in a sum of rewards, groups that disagree keep p near one half, however certain each of them is.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from smpo_schemas.preference.base import Preference, ScoredPairs, sigmoid


class Mixture(Preference):
    """Averages the groups' probabilities by weights that are scaled to sum to 1."""

    name: ClassVar[str] = "mixture"
    summary: ClassVar[str] = (
        "weighted mean of the sigmoids of score differences, each divided by its temperature from --calibration"
    )
    calibration: ClassVar[Literal["refused", "optional", "required"]] = "required"
    normalise_weights: ClassVar[bool] = True

    def probability(self, pairs: ScoredPairs) -> np.ndarray:
        """See the base class."""
        return sigmoid(self.margins(pairs)) @ np.array(list(self.weights.values()))
