"""People's own votes, shrunk towards a prior the fewer they are; the prior is 1/2 or that of calibrated rewards.

A pair's true share q, of all people, has a Beta prior of mean m whose strength s counts as s votes; k of n people voted
for image_0. The posterior mean is

    p = (k + s m) / (n + s),

with m = 1/2 (``votes``; a symmetric Beta(s/2, s/2)), or m the calibrated mixture's p (``votes-mixture``). With many
votes p is their share, with few the prior. ``smpo-pipeline calibrate`` fits s to the votes (beta-binomial likelihood).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from smpo_common.errors import UserError
from smpo_schemas.preference.base import Preference, ScoredPairs
from smpo_schemas.preference.mixture import Mixture
from smpo_schemas.scoring.calibration import Calibration

DEFAULT_STRENGTH = 2.0
"""Strength without a calibration: with m = 1/2 the uniform prior, Laplace's rule of succession."""


def posterior_mean(
    labels_P: np.ndarray, votes_P: np.ndarray, prior_P: np.ndarray | float, strength: float
) -> np.ndarray:
    """Return P(image_0 preferred), float64 [P].

    Args:
        labels_P: share of the votes for image_0, float [P]; NaN without a label, which counts as no votes.
        votes_P: numbers of votes, float [P]; NaN where unknown, which counts as one.
        prior_P: mean of the prior, 0 to 1.
        strength: strength of the prior, counted in votes.
    """
    labelled = ~np.isnan(labels_P)
    votes = np.where(labelled, np.where(np.isnan(votes_P), 1.0, votes_P), 0.0)
    return (np.where(labelled, labels_P, 0.0) * votes + strength * prior_P) / (votes + strength)


class Votes(Preference):
    """Shares of votes, drawn towards 1/2; a pair without a label has no p."""

    name: ClassVar[str] = "votes"
    summary: ClassVar[str] = "people's share of votes, drawn towards 1/2 the fewer they are; uses no reward"
    calibration: ClassVar[Literal["refused", "optional", "required"]] = "optional"
    uses_rewards: ClassVar[bool] = False
    uses_labels: ClassVar[bool] = True
    needs: ClassVar[str] = "a label"

    @classmethod
    def strength_of(cls, calibration: Calibration | None) -> float:
        """See the base class."""
        votes = calibration.votes if calibration else None
        return votes.strength if votes else DEFAULT_STRENGTH

    def probability(self, pairs: ScoredPairs) -> np.ndarray:
        """See the base class; NaN without a label."""
        labels_P, votes_P = labels_and_votes(pairs)
        return np.where(np.isnan(labels_P), np.nan, posterior_mean(labels_P, votes_P, 0.5, self.strength))


class VotesMixture(Mixture):
    """Shares of votes, drawn towards the mixture's p; a pair without a label has the mixture's p."""

    name: ClassVar[str] = "votes-mixture"
    summary: ClassVar[str] = "people's share of votes, drawn towards the mixture's p the fewer they are"
    uses_labels: ClassVar[bool] = True

    @classmethod
    def strength_of(cls, calibration: Calibration | None) -> float:
        """See the base class."""
        votes = calibration.votes if calibration else None
        return votes.mixture_strength if votes else DEFAULT_STRENGTH

    def probability(self, pairs: ScoredPairs) -> np.ndarray:
        """See the base class."""
        return posterior_mean(*labels_and_votes(pairs), super().probability(pairs), self.strength)


def labels_and_votes(pairs: ScoredPairs) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels and the numbers of votes, float64 [P] each.

    Raises:
        UserError: they are unknown.
    """
    if pairs.labels_P is None:
        raise UserError("this preference uses people's votes, but the pairs have no labels")
    votes_P = np.full(len(pairs.labels_P), np.nan) if pairs.votes_P is None else pairs.votes_P
    return pairs.labels_P, votes_P
