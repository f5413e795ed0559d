"""Keep the point with the smallest residual of each row's search, and tell whether to go on searching.

Shape suffixes: R rows of the step, N those still searched, C h w a latent.
"""

from __future__ import annotations

import torch

from smpo_pipeline.inversion.step import Solution, Step, distance

GROWTH = 2.0
"""A row whose residual is more than this many times its best goes back to its best point."""

_PATIENCE = 8
_PROGRESS = 0.9
"""A row is given up if its best residual does not fall below this share of itself in ``_PATIENCE`` evaluations."""


class Best:
    """The best point x of each row, its image F(x_s, d(x, t)), and the distance of the two."""

    def __init__(self, step: Step, tolerance: float) -> None:
        self.x_RChw = step.x_s_RChw.clone()
        self.image_RChw = step.x_s_RChw.clone()
        self.residual_R = torch.full_like(step.x_s_RChw[:, 0, 0, 0], torch.inf)
        self._tolerance = tolerance
        self._milestone_R = self.residual_R.clone()
        self._waited_R = torch.zeros_like(self.residual_R)

    def update(self, rows_N: torch.Tensor, x_NChw: torch.Tensor, image_NChw: torch.Tensor) -> torch.Tensor:
        """Keep the points that are better than their rows' best; return the residuals of all points: [N]."""
        residual = distance(x_NChw, image_NChw)
        better = residual < self.residual_R[rows_N]
        rows = rows_N[better]
        self.x_RChw[rows], self.image_RChw[rows] = x_NChw[better], image_NChw[better]
        self.residual_R[rows] = residual[better]
        nearer = self.residual_R[rows_N] < _PROGRESS * self._milestone_R[rows_N]
        self._milestone_R[rows_N] = torch.where(nearer, self.residual_R[rows_N], self._milestone_R[rows_N])
        self._waited_R[rows_N] = torch.where(nearer, 0.0, self._waited_R[rows_N] + 1)
        return residual

    def searchable(self, rows_N: torch.Tensor) -> torch.Tensor:
        """Return which rows have neither converged nor been given up: bool [N]."""
        residual = self.residual_R[rows_N]
        return (residual > self._tolerance) & residual.isfinite() & (self._waited_R[rows_N] < _PATIENCE)

    def solution(self) -> Solution:
        """Return the best point of each row; its residual says whether it is a solution.

        A row whose first image is not finite has no such point. It gets NaN, so that its pair is rejected.
        """
        none = ~self.residual_R.isfinite()
        x_RChw = self.x_RChw.masked_fill(none[:, None, None, None], torch.nan)
        return Solution(x_RChw, self.residual_R.masked_fill(none, torch.nan))
