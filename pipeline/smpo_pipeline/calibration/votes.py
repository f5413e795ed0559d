"""Fit the prior that is combined with people's votes on a pair: how many votes it counts as.

The true share of votes for image_0 has a Beta(s m, s (1 - m)) prior. If k of a pair's n votes are for image_0, the
likelihood of s is the beta-binomial's: the product of B(k + s m, n - k + s (1 - m)) / B(s m, s (1 - m)) over the pairs.
Shares need not be whole votes
(ties count half, some data sets weigh their annotators). The probability of a single vote is m whatever s is, so pairs
with one vote are left out. A wide normal prior on log s keeps it at its default where no pair has more.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import betaln

from smpo_pipeline.calibration.agreement import pair_keys
from smpo_pipeline.calibration.labels import LabelledPairs
from smpo_schemas.preference.votes import DEFAULT_STRENGTH
from smpo_schemas.scoring.calibration import VotesPrior

_PRIOR_STD = 3.0
_BOUNDS = (math.log(1e-3), math.log(1e5))
_SMALLEST = 1e-6
"""Distance of a prior's mean from 0 and 1."""


def fit_strength(for_first_P: np.ndarray, votes_P: np.ndarray, mean_P: np.ndarray | float) -> float:
    """Fit the strength s of the prior, in votes.

    Args:
        for_first_P: votes for image_0 of each pair, from 0 to ``votes_P``.
        votes_P: all votes of each pair.
        mean_P: mean m of the prior, 0 to 1.
    """
    several = votes_P > 1
    k, n = for_first_P[several], votes_P[several]
    m = np.clip(np.broadcast_to(mean_P, len(votes_P))[several], _SMALLEST, 1 - _SMALLEST)

    def loss(log_s: float) -> float:
        a, b = math.exp(log_s) * m, math.exp(log_s) * (1 - m)
        likelihood = betaln(k + a, n - k + b) - betaln(a, b)
        return (log_s - math.log(DEFAULT_STRENGTH)) ** 2 / (2 * _PRIOR_STD**2) - float(likelihood.sum())

    return math.exp(minimize_scalar(loss, bounds=_BOUNDS, method="bounded", options={"xatol": 1e-6}).x)


def fit_votes_prior(data: LabelledPairs, mixture_P: np.ndarray) -> VotesPrior:
    """Fit the priors of both preferences that use votes; rows of one pair count together.

    Args:
        data: the labels.
        mixture_P: the mixture's P(image_0 preferred) of each row, predicted on held-out prompts.
    """
    rows = np.flatnonzero(data.labelled)
    keys, turned = pair_keys(data, rows)
    _, pair = np.unique(keys, return_inverse=True)
    votes_P = data.votes_P[rows]
    label_P, mean_P = (np.where(turned, 1 - p_P, p_P) for p_P in (data.labels_P[rows], mixture_P[rows]))
    votes = np.bincount(pair, votes_P)
    for_first = np.bincount(pair, votes_P * label_P)
    mean = np.bincount(pair, mean_P) / np.bincount(pair)
    return VotesPrior(
        strength=fit_strength(for_first, votes, 0.5),
        mixture_strength=fit_strength(for_first, votes, mean),
        pairs=len(votes),
        votes=round(votes.sum()),
    )
