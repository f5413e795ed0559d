"""What scores mean: from raw rewards to P(image_0 preferred) (DESIGN 4.4; arXiv 2506.02698, section 4.1)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from smpo_schemas.errors import UserError
from smpo_schemas.scores import RewardStatistics


def normalise_scores(scores: np.ndarray, statistics: RewardStatistics) -> np.ndarray:
    """Bring raw scores (any shape) to one scale: (r - min) / (max - min) over the data set."""
    spread = statistics.max - statistics.min
    if spread <= 0:
        raise UserError(
            f"reward model {statistics.model}: all images have the score {statistics.min}, so it prefers none of them"
        )
    return (np.asarray(scores, dtype=np.float64) - statistics.min) / spread


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Logistic function that does not overflow."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(x, dtype=np.float64)))


def preference(
    scores: Mapping[str, np.ndarray], statistics: Mapping[str, RewardStatistics], weights: Mapping[str, float]
) -> np.ndarray:
    """P(image_0 preferred) under a weighted mix of rewards: p = sigmoid(sum_k w_k (r'_k0 - r'_k1)).

    Args:
        scores: per reward float [P, 2], raw scores of image_0 and image_1.
        statistics: per reward, the data set's minimum and maximum.
        weights: per reward, its weight; they are used as given, not normalised.

    Returns:
        float64 [P], in (0, 1).

    Raises:
        UserError: a weighted reward was not scored, or is constant over the data set.
    """
    margin: np.ndarray | float = 0.0
    for name, weight in weights.items():
        if name not in scores or name not in statistics:
            raise UserError(f"reward {name!r} is not among the scored ones ({', '.join(statistics) or 'none'})")
        scaled = normalise_scores(scores[name], statistics[name])
        margin = margin + weight * (scaled[..., 0] - scaled[..., 1])
    return sigmoid(np.asarray(margin))
