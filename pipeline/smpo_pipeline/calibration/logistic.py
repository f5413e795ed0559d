"""Logistic regression with an L2 penalty, convex and deterministic: L-BFGS on a float64 objective.

With z = x v + offset + b the objective is sum_n w_n [log(1 + exp z) - y z] + l2 / 2 |s v|^2. s is the spread of each
feature over the rows with a weight (the standard deviation, or without b the root mean square), so that l2 means the
same for features of any scale; b, if there is one, is not penalised. Rows are converted to float64 block by block: a
million rows take no more memory than they already do. L-BFGS works on weights that are scaled by the spectrum of the
features' covariance, for which the curvature is about the same in all directions: tens of passes, not thousands.

Shape suffixes: N rows, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

PENALTIES = (1e2, 1e1, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Values of l2 to choose from, the strongest first."""

_BLOCK = 1 << 13
_RISES = 2
_SKETCH = 1 << 15
"""Maximum number of rows that the spectrum is computed from: it only affects the number of passes."""
_OPTIONS = {"maxiter": 2000, "maxfun": 4000, "maxcor": 30, "ftol": 1e-14, "gtol": 1e-9}
_FLAT = 1e-12
"""Smallest eigenvalue as a share of the largest."""

_CONSTANT = 1e-6
"""A feature whose spread is below this share of its size is treated as constant: the rest is rounding."""


Spectrum = tuple[np.ndarray, np.ndarray]
"""Eigenvalues and eigenvectors, see :meth:`Objective.spectrum`."""


@dataclass(frozen=True)
class Regression:
    """The weights of a fit: ``v_D`` in units of the features, and ``b``."""

    v_D: np.ndarray
    b: float


@dataclass(frozen=True)
class Rows:
    """Rows of a regression.

    Attributes:
        x_ND: features, of any floating dtype.
        y_N: targets from 0 to 1.
        offset_N: added to z; None: 0.
        intercept: whether b is fitted; features are then centred.
    """

    x_ND: np.ndarray
    y_N: np.ndarray
    offset_N: np.ndarray | None = None
    intercept: bool = True

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield ranges of rows with their features in float64."""
        for start in range(0, len(self.x_ND), _BLOCK):
            rows = slice(start, start + _BLOCK)
            yield rows, self.x_ND[rows].astype(np.float64)

    def logit(self, block: slice, x_BD: np.ndarray, fitted: Regression) -> np.ndarray:
        """Compute z of a block of rows."""
        return x_BD @ fitted.v_D + fitted.b + (0.0 if self.offset_N is None else self.offset_N[block])

    def logits(self, fitted: Regression) -> np.ndarray:
        """Compute z of all rows, float64 [N]."""
        return np.concatenate([self.logit(block, x_BD, fitted) for block, x_BD in self.blocks()])


@dataclass(frozen=True)
class Objective:
    """The objective, as a function of the scaled weights s v, followed by b.

    Attributes:
        rows: of the regression.
        weight_N: w of each row.
        l2: the penalty.
        moments: of the features (:func:`find_moments`).
    """

    rows: Rows
    weight_N: np.ndarray
    l2: float
    moments: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, rows: Rows, weight_N: np.ndarray, l2: float) -> Self:
        """Make the objective of rows with these weights."""
        return cls(rows, weight_N, l2, find_moments(rows, weight_N))

    def __call__(self, u: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the value, and its gradient by ``u``."""
        mean_D, inverse_D = self.moments
        width, fitted = len(mean_D), self.unscaled(u)
        value, slope, gradient_D = 0.0, 0.0, np.zeros(width)
        for block, x_BD in self.rows.blocks():
            z_B = self.rows.logit(block, x_BD, fitted)
            weight_B, y_B = self.weight_N[block], self.rows.y_N[block]
            value += float(weight_B @ (np.logaddexp(0, z_B) - y_B * z_B))
            slope_B = weight_B * (expit(z_B) - y_B)
            slope += float(slope_B.sum())
            gradient_D += slope_B @ x_BD
        gradient_D = (gradient_D - slope * mean_D) * inverse_D + self.l2 * u[:width]
        value += float(self.l2 / 2 * (u[:width] @ u[:width]))
        return value, np.append(gradient_D, [slope] if self.rows.intercept else [])

    def unscaled(self, u: np.ndarray) -> Regression:
        """Convert the scaled weights to those of the features."""
        mean_D, inverse_D = self.moments
        v_D = u[: len(mean_D)] * inverse_D
        return Regression(v_D, float(u[-1] - mean_D @ v_D) if self.rows.intercept else 0.0)

    def minimise(self, start: np.ndarray | None = None, spectrum: Spectrum | None = None) -> np.ndarray:
        """Return the scaled weights at the minimum; ``start`` and ``spectrum`` affect the time only."""
        values_D, vectors_DD = spectrum or self.spectrum()
        # The Hessian is at most a quarter of the covariance, plus l2.
        scale = 1 / np.sqrt(np.append(values_D / 4 + self.l2, [0.25] if self.rows.intercept else []))
        width = len(values_D)

        def turned(u: np.ndarray, matrix: np.ndarray) -> np.ndarray:
            return np.append(matrix @ u[:width], u[width:])

        def objective(q: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = self(turned(scale * q, vectors_DD))
            return value, scale * turned(gradient, vectors_DD.T)

        first = np.zeros(len(scale)) if start is None else turned(start, vectors_DD.T) / scale
        found = minimize(objective, first, jac=True, method="L-BFGS-B", options=_OPTIONS).x
        return turned(scale * found, vectors_DD)

    def spectrum(self) -> Spectrum:
        """Return eigenvalues [D] and eigenvectors [D, D] of the scaled features' covariance."""
        mean_D, inverse_D = self.moments
        step = -(-len(self.weight_N) // _SKETCH)
        x_SD, weight_S = (self.rows.x_ND[::step].astype(np.float64) - mean_D) * inverse_D, self.weight_N[::step]
        share = self.weight_N.sum() / max(weight_S.sum(), np.finfo(float).tiny)
        values_D, vectors_DD = np.linalg.eigh((x_SD * (share * weight_S)[:, None]).T @ x_SD)
        return np.maximum(values_D, _FLAT * values_D[-1]), vectors_DD


def find_moments(rows: Rows, weight_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and inverse spread of each feature, float64 [D]; without an intercept the mean is 0."""
    total, width = weight_N.sum(), rows.x_ND.shape[1]
    mean_D = np.zeros(width)
    if rows.intercept:
        mean_D = sum((weight_N[block] @ x_BD for block, x_BD in rows.blocks()), mean_D) / total
    square_D = sum((weight_N[block] @ (x_BD - mean_D) ** 2 for block, x_BD in rows.blocks()), np.zeros(width)) / total
    spread_D = np.sqrt(square_D)
    varies_D = spread_D > _CONSTANT * np.abs(mean_D)
    return mean_D, np.divide(1, spread_D, out=np.zeros(width), where=varies_D)


@dataclass(frozen=True)
class CrossFit:
    """Cross-fitted predictions.

    Attributes:
        z_N: logit of each row by the fit that has not seen its fold.
        l2: the penalty with the lowest held-out loss.
        loss: that loss.
    """

    z_N: np.ndarray
    l2: float
    loss: float


def cross_fit(rows: Rows, fold_N: np.ndarray, weigh: Callable[[np.ndarray], np.ndarray]) -> CrossFit:
    """Predict each fold's rows by a fit to the other folds, and choose the penalty with the lowest held-out loss.

    Penalties become weaker until the held-out loss has been above its lowest value twice in a row.

    Args:
        rows: of all folds.
        fold_N: fold of each row, from 0.
        weigh: gives the rows that a mask (bool [N]) selects their weights, float64 [N], and the others 0; the held-out
            loss takes the weights of all rows.
    """
    weights = [weigh(fold_N != fold) for fold in range(fold_N.max() + 1)]
    starts: list[np.ndarray | None] = [None] * len(weights)
    everything = weigh(np.ones(len(fold_N), dtype=bool))
    moments = [find_moments(rows, weight_N) for weight_N in weights]
    spectrum = Objective(rows, everything, 0.0, moments[0]).spectrum()
    best, rises = CrossFit(np.zeros(0), np.inf, np.inf), 0
    for l2 in PENALTIES:
        z_N = np.zeros(len(fold_N))
        for fold, weight_N in enumerate(weights):
            objective = Objective(rows, weight_N, l2, moments[fold])
            starts[fold] = u = objective.minimise(starts[fold], spectrum)
            z_N[fold_N == fold] = rows.logits(objective.unscaled(u))[fold_N == fold]
        loss = float(everything @ (np.logaddexp(0, z_N) - rows.y_N * z_N))
        rises = rises + 1 if loss > best.loss else 0
        if loss < best.loss:
            best = CrossFit(z_N, l2, loss)
        if rises == _RISES:
            break
    return best
