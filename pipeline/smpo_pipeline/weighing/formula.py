"""DoRA's calibration value (arXiv 2504.05831): how much denser the golden distribution is at an image than the data.

With c = P(golden | image, prompt) between the golden pairs and source i, both classes counting the same, (1 - c) / c is
the source's density over that of the golden pairs. With alpha the golden share of the data and alpha_i the source's,

    w = 1 / (alpha + alpha_i (1 - c) / c).

With one source this is the golden density over the data's. With several, an image of source i is compared with its own
source only, as published: exact where sources do not overlap. An image of a golden pair belongs to none of them, so all
count: w = 1 / (alpha + sum_i alpha_i (1 - c_i) / c_i).

Shape suffixes: P pairs, 2 images, S sources.
"""

from __future__ import annotations

import numpy as np

MIN_C = 1e-4
"""c is kept this far from 0 and 1."""

GOLDEN = -1
"""Number of a golden pair's source."""


def image_weights(c_P2S: np.ndarray, source_P: np.ndarray, alpha: float, alpha_S: np.ndarray) -> np.ndarray:
    """Compute w of each image, float64 [P, 2], from 0 to 1 / alpha.

    Args:
        c_P2S: c of each image between the golden pairs and each source. For a golden pair all are used, for others only
            that of the pair's own source.
        source_P: number of each pair's source, :data:`GOLDEN` for golden pairs.
        alpha: share of the golden pairs.
        alpha_S: share of each source; all shares sum to 1.
    """
    c = np.clip(c_P2S, MIN_C, 1 - MIN_C)
    terms_P2S = alpha_S * (1 - c) / c
    golden = source_P == GOLDEN
    own_P2 = np.take_along_axis(terms_P2S, np.maximum(source_P, 0)[:, None, None], axis=2)[..., 0]
    return 1 / (alpha + np.where(golden[:, None], terms_P2S.sum(axis=2), own_P2))


def pair_weights(w_P2: np.ndarray, *, normalise: bool) -> np.ndarray:
    """Return the mean over a pair's images, float64 [P]; with ``normalise`` divided by the mean over all pairs."""
    w_P = w_P2.mean(axis=1)
    return w_P / w_P.mean() if normalise else w_P


def effective_size(w_P: np.ndarray) -> float:
    """Return (sum w)^2 / sum w^2: how many equally weighted pairs say as much."""
    return float(w_P.sum() ** 2 / (w_P**2).sum())
