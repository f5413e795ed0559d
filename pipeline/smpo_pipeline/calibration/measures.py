"""Measures of how well probabilities predict labels. Swapping the images of a pair changes none of them."""

from __future__ import annotations

import numpy as np

from smpo_schemas.scoring.calibration import Bin, Fit
from smpo_schemas.scoring.scores import label_agreement

NUM_BINS = 10
"""Equal bins of the preferred image's p, from 0.5 to 1."""

_SMALLEST = 1e-12


def log_loss(p_P: np.ndarray, label_P: np.ndarray, votes_P: np.ndarray | None = None) -> float:
    """Compute the mean cross-entropy in nats; a label is P(image_0 preferred), 0.5 for a tie, and counts as its votes.

    p is clipped 1e-12 away from 0 and 1, so that one label cannot make the loss infinite.
    """
    p = np.clip(p_P, _SMALLEST, 1 - _SMALLEST)
    return float(np.average(-label_P * np.log(p) - (1 - label_P) * np.log1p(-p), weights=votes_P))


def agreement(p_P: np.ndarray, label_P: np.ndarray) -> tuple[int, int]:
    """Count the decided labels that p agrees with, and all decided labels; p = 0.5 agrees with none."""
    return label_agreement(p_P - 0.5, label_P)


def reliability(p_P: np.ndarray, label_P: np.ndarray, votes_P: np.ndarray | None = None) -> list[Bin]:
    """Bin labels by the p of the preferred image, each as often as it has votes; empty bins are left out."""
    votes_P = np.ones(len(p_P)) if votes_P is None else votes_P
    preferred_P = np.maximum(p_P, 1 - p_P)
    chosen_P = np.where(p_P > 0.5, label_P, np.where(p_P < 0.5, 1 - label_P, 0.5))  # noqa: PLR2004  (one half)
    edges = np.linspace(0.5, 1, NUM_BINS + 1)
    number_P = np.clip(np.searchsorted(edges, preferred_P, side="right") - 1, 0, NUM_BINS - 1)
    bins = []
    for number in np.unique(number_P):
        inside = number_P == number
        bins.append(
            Bin(
                start=float(edges[number]),
                stop=float(edges[number + 1]),
                labels=round(votes_P[inside].sum()),
                mean_p=float(np.average(preferred_P[inside], weights=votes_P[inside])),
                share_chosen=float(np.average(chosen_P[inside], weights=votes_P[inside])),
            )
        )
    return bins


def calibration_error(bins: list[Bin]) -> float:
    """Compute the expected calibration error: mean of abs(mean p - share chosen) over bins, weighted by labels."""
    total = sum(item.labels for item in bins)
    return sum(item.labels * abs(item.mean_p - item.share_chosen) for item in bins) / total


def measure(p_P: np.ndarray, label_P: np.ndarray, votes_P: np.ndarray | None = None) -> Fit:
    """Compute all measures; a label counts as its votes, but once in the agreement."""
    bins = reliability(p_P, label_P, votes_P)
    alike, decided = agreement(p_P, label_P)
    return Fit(
        agreement=alike / decided if decided else None,
        log_loss=log_loss(p_P, label_P, votes_P),
        calibration_error=calibration_error(bins),
        bins=bins,
    )
